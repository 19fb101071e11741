"""The table of requests shows what the functions say, and one is chosen: by row, by name, or one's own."""

import threading

import pytest

from nbkit import panels
from nbkit.errors import ModelError, RequestError
from nbkit.models.prompts import shown_tokens, subject_last
from nbkit.panels.jobs import jobs_of
from nbkit.records.requests import EditRequest
from nbkit.studies.risk import collapse_risk, risk_in_words


@pytest.fixture
def settings(contexts):
    """Of every risk here: a tiny model has no layer of its own."""
    return {"layer": 1, "context_templates": contexts}


@pytest.fixture
def browser(tiny, requests, settings):
    return panels.requests(tiny, requests, **settings)


def write(browser, **said):
    for name, text in said.items():
        browser.form.fields[name].value = text
    browser.form.take.click()


def test_the_table_shows_every_request_with_the_risk_that_the_function_gives(tiny, requests, settings):
    many = [EditRequest("{} is in", f"Ann {i}", "Krela") for i in range(700)]
    browser = panels.requests(tiny, requests + many, **settings)
    expected = collapse_risk(tiny, requests + many, **settings)
    assert browser.frame["risk"].to_numpy() == pytest.approx(expected["risk"].to_numpy(), rel=1e-6)
    assert browser.frame["case_id"].tolist()[:4] == ["0", "1", "2", "#3"]
    assert len(browser.table.df) == 703 and "downsampling_warning" not in browser.table._dt_args


def test_a_row_that_is_clicked_is_chosen_and_a_second_click_keeps_it(tiny, browser, requests):
    heard = []
    browser.observe(lambda change: heard.append(change["new"]), "request")
    browser.table.selected_rows = [2]
    browser.table.selected_rows = []
    assert heard == [requests[2]] and browser.request == requests[2]
    assert risk_in_words(browser.risk, browser.frame["risk"]) in browser.words.value
    assert browser.words.value.count("of-subject") == len(shown_tokens(tiny, requests[2])[1])
    assert risk_in_words(browser.risk, browser.frame["risk"]) in browser.drawing.value, "the figure in words"


@pytest.mark.parametrize("said", ["1", "Ann", "1 · Ann"])
def test_a_case_is_chosen_by_name(browser, requests, said):
    browser.go.value = said
    assert browser.request == requests[1] and browser.table.selected_rows == [1]


def test_an_unknown_case_is_refused_in_words(browser):
    browser.choose(0)
    browser.go.value = "77"
    assert "no case &#x27;77&#x27;" in browser.notice.value and browser.request.case_id == 0
    with pytest.raises(RequestError, match="no case '77'"):
        browser.choose(77)


def test_a_request_of_ones_own_is_told_among_the_others(tiny, browser, settings):
    write(browser, prompt="{} sings the ", subject="You", target_new="song")
    own = EditRequest("{} sings the", "You", "song")
    assert browser.request == own and browser.table.selected_rows == []
    assert browser.risk == pytest.approx(collapse_risk(tiny, [own], **settings)["risk"][0])
    assert risk_in_words(browser.risk, browser.frame["risk"]) in browser.words.value


@pytest.mark.parametrize(
    ["said", "words"],
    [
        ({"prompt": "sings the"}, "exactly one"),
        ({"subject": ""}, "subject"),
        ({"target_true": "song"}, "nothing to edit"),
        ({"prompt": "river " * 200 + "{}"}, "more than the context"),
    ],
)
def test_what_no_method_could_use_is_refused_where_it_is_typed_and_the_choice_stays(browser, requests, said, words):
    browser.choose(1)
    browser.form.copy.click()
    write(browser, **{"prompt": "{} sings the", "target_new": "song", "target_true": ""} | said)
    assert 'role="alert"' in browser.form.problem.value and words in browser.form.problem.value
    assert browser.request == requests[1]
    write(browser, prompt="{} sings the", subject="You", target_new="song", target_true="")
    assert browser.form.problem.value == "" and browser.request.subject == "You"


def test_other_settings_are_computed_as_a_job_and_refused_ones_leave_the_table(tiny, browser, requests, settings):
    before, unedited = browser.frame, tiny.hash
    browser.choose(2)
    assert browser.refresh(layer=9)
    browser.jobs.wait()
    assert "layer 9 does not exist" in browser.notice.value and browser.frame is before
    assert browser.refresh(layer=2, key_mode="plain")
    browser.jobs.wait()
    expected = collapse_risk(tiny, requests, **settings | {"layer": 2, "key_mode": "plain"})
    assert browser.frame["risk"].to_numpy() == pytest.approx(expected["risk"].to_numpy(), rel=1e-6)
    assert browser.notice.value == "" and "layer 2, keys plain" in browser.words.value
    assert browser.request == requests[2] and browser.table.selected_rows == [2] and tiny.hash == unedited


def test_while_the_model_is_at_work_nothing_else_is_computed_and_the_choice_is_still_taken(tiny, browser):
    began, go_on = threading.Event(), threading.Event()

    def work(step):
        from nbkit.edits.door import in_use

        with in_use(tiny):
            began.set()
            go_on.wait(10)

    assert jobs_of(tiny).start("layers", work, lambda found: None, lambda error: None)
    began.wait(10)
    assert not browser.refresh() and "“layers” is at work" in browser.notice.value
    write(browser, prompt="{} sings the", subject="You", target_new="song")
    assert browser.request.subject == "You" and "“layers” is at work on the model" in browser.words.value
    assert "not computed yet" in browser.words.value
    go_on.set()
    jobs_of(tiny).wait()
    browser.again.click()
    browser.jobs.wait()
    assert "not computed yet" not in browser.words.value and "at work" not in browser.words.value


def test_the_risk_can_wait_until_it_is_asked_for(tiny, requests, settings, monkeypatch):
    monkeypatch.setattr("nbkit.panels.request_browser.collapse_risk", lambda *a, **k: pytest.fail("computed"))
    browser = panels.requests(tiny, requests, **settings, risk=False)
    browser.choose(1)
    assert "not computed yet" in browser.words.value and browser.drawing.value == ""


def test_what_the_door_refuses(tiny, requests, settings):
    with pytest.raises(ModelError, match="LanguageModel"):
        panels.requests("gpt2", requests)
    with pytest.raises(RequestError, match="no request"):
        panels.requests(tiny, [], **settings)
    with pytest.raises(ModelError, match="layer 9"):
        panels.requests(tiny, requests, **settings | {"layer": 9})


def test_where_a_risk_lies_in_words():
    assert risk_in_words(5.0, [1.0, 2.0, 9.0]) == "higher than 66 % of the 3 requests"
    assert risk_in_words(9.0, [1.0, 9.0]) == "the highest of the 2 requests"
    assert risk_in_words(float("inf"), [1.0, 9.0]) == "higher than that of all 2 requests"
    assert risk_in_words(1.0, [1.0, 9.0]) == "the lowest of the 2 requests"
    assert risk_in_words(0.5, [1.0, 9.0]) == "lower than that of all 2 requests"
    assert "NaN" in risk_in_words(float("nan"), [1.0])


def test_the_tokens_shown_are_the_text_and_the_last_of_the_subject_is_the_one_edited(lm, requests):
    for request in requests:
        tokens, of_subject = shown_tokens(lm, request)
        assert "".join(tokens).endswith(request.text) and len(tokens) >= 3
        assert of_subject[-1] == subject_last(lm, request.prompt, request.subject)
        assert request.subject in "".join(tokens[place] for place in of_subject)
        assert len(tokens) == len(lm.tokenizer(request.text).input_ids)
