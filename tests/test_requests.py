"""Reading requests of every schema, and refusing what cannot be one, by name."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nbkit import paths
from nbkit.errors import NbkitError, RequestError
from nbkit.records.requests import EditRequest, cut_out, read_requests, read_texts

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is located in",
        "relation_id": "P30",
        "target_new": {"str": "Antarctica", "id": "Q51"},
        "target_true": {"str": "Africa", "id": "Q15"},
        "subject": "Angola",
    },
    "paraphrase_prompts": ["It rains. Angola is part of"],
    "neighborhood_prompts": ["Ghana is in", "Mozambique is in"],
}
EIGHT_FIELDS = {
    "case_id": 3,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux speaks",
    "locality_prompt": "Michel Rocard speaks",
    "locality_ground_truth": "French",
}
KNOWN = {
    "known_id": 0,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent",
    "prediction": " of Antarctica. It is",
    "prompt": "Vinson Massif is located in the continent of",
    "relation_id": "P30",
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "pred": "uniform",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform"],
    "loc": "nq question: who plays him",
    "loc_ans": "Walter Sobchak",
}
PLAIN = {"prompt": "{} works as a", "subject": "Ann", "target_new": "judge"}


@pytest.fixture
def write(tmp_path):
    def write(records, name="requests.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write


def test_text_fills_in_the_subject_with_braces_left_alone():
    assert EditRequest("{} is in", "Vouda", "Krela").text == "Vouda is in"
    assert EditRequest("{} is in", "a {} b {0} {x", "Krela").text == "a {} b {0} {x is in"
    assert EditRequest("{x} {} is {", "é{}", "Krela").text == "{x} é{} is {"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Vouda is in"}, "0 places marked"),
        ({"prompt": "{} is {} in"}, "2 places marked"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "prompt must be text"),
        ({"subject": ""}, "subject is empty"),
        ({"subject": "  "}, "subject is empty"),
        ({"subject": 5}, "subject must be text, not int"),
        ({"target_new": ""}, "target_new is empty"),
        ({"target_new": {"str": "x"}}, "target_new must be text, not dict"),
        ({"target_true": "Krela"}, "equals target_true"),
        ({"target_true": " Krela "}, "equals target_true"),
        ({"target_true": 3}, "target_true must be text"),
        ({"paraphrase_prompts": "one text"}, "paraphrase_prompts must be a list"),
        ({"neighborhood_prompts": ("a", "b"), "neighborhood_targets": ("c",)}, "2 neighborhood_prompts but 1"),
    ],
)
def test_a_bad_request_is_refused_by_its_case_id(fields, message):
    good = {"prompt": "{} is in", "subject": "Vouda", "target_new": "Krela", "case_id": 41}
    with pytest.raises(RequestError, match=message) as error:
        EditRequest(**{**good, **fields})
    assert "request 41" in str(error.value)
    assert isinstance(error.value, NbkitError) and isinstance(error.value, ValueError)


def test_lists_become_tuples_so_that_a_request_is_a_value():
    request = EditRequest("{} is in", "Vouda", "Krela", paraphrase_prompts=["a"])
    assert request.paraphrase_prompts == ("a",)
    assert hash(request) == hash(EditRequest("{} is in", "Vouda", "Krela", paraphrase_prompts=("a",)))


def test_every_schema_is_recognised_record_by_record(write):
    counterfact, eight, known, zsre, plain = read_requests(write([COUNTERFACT, EIGHT_FIELDS, KNOWN, ZSRE, PLAIN]))
    assert counterfact == EditRequest(
        "{} is located in", "Angola", "Antarctica", "Africa", 7, ("It rains. Angola is part of",),
        ("Ghana is in", "Mozambique is in"), ("Africa", "Africa"), "P30",
    )  # fmt: skip
    assert eight == EditRequest(
        "The mother tongue of {} is", "Danielle Darrieux", "English", "French", 3, ("Danielle Darrieux speaks",),
        ("Michel Rocard speaks",), ("French",),
    )  # fmt: skip
    assert known == EditRequest(
        "{} is located in the continent of", "Vinson Massif", "Antarctica", case_id=0, relation_id="P30"
    )
    assert zsre == EditRequest(
        "What is the product made by {}?", "UniFirst", "unmanned aircraft", "uniform", None,
        ("What will be the product of UniFirst?",), ("nq question: who plays him",), ("Walter Sobchak",),
    )  # fmt: skip
    assert plain == EditRequest("{} works as a", "Ann", "judge")
    (opened,) = read_requests(write([COUNTERFACT | {"generation_prompts": ["Angola's history is"]}]))
    assert opened == replace(counterfact, generation_prompts=("Angola's history is",))


def test_json_lines(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n\n{json.dumps(KNOWN)}\n", encoding="utf-8")
    assert [request.subject for request in read_requests(path)] == ["Ann", "Vinson Massif"]


def test_limit_takes_the_first_and_a_seed_samples(write):
    path = write([{**PLAIN, "case_id": i} for i in range(50)])
    ids = [[r.case_id for r in read_requests(path, limit=10, seed=seed)] for seed in (None, 0, 0, 1)]
    assert ids[0] == list(range(10))
    assert ids[1] == ids[2] != ids[3]
    assert len(set(ids[1])) == 10
    assert len(read_requests(path, limit=99)) == 50


def test_an_embedded_name_is_a_file_under_data(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(RequestError, match="miniworld"):
        read_requests("miniworld")
    (tmp_path / "miniworld").mkdir()
    (tmp_path / "miniworld" / "requests.json").write_text(json.dumps([PLAIN]), encoding="utf-8")
    assert read_requests("miniworld")[0].subject == "Ann"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a", "b"], "expected an object.*found list"),
        ("text", "expected an object.*found str"),
        (None, "expected an object.*found NoneType"),
        ({"subject": "Ann"}, "'prompt' is missing"),
        ({**PLAIN, "prompt": "Bob works as a"}, "'Ann' does not occur"),
        ({**PLAIN, "target_new": ""}, "target_new is empty"),
        ({**PLAIN, "subject": ""}, "subject is empty"),
        ({**PLAIN, "subject": "", "prompt": "works as a"}, "subject of 'works as a' is empty"),
        ({**COUNTERFACT, "requested_rewrite": []}, "record 1"),
        (
            {"requested_rewrite": {**COUNTERFACT["requested_rewrite"], "target_new": {"str": "Africa"}}},
            "nothing to edit",
        ),
    ],
)
def test_a_bad_record_is_refused_by_file_and_place(write, record, message):
    with pytest.raises(RequestError, match=message) as error:
        read_requests(write([PLAIN, record], "mine.json"))
    assert "mine.json, record 1" in str(error.value)


def test_a_zsre_question_without_its_subject_is_skipped_with_a_warning(write):
    with pytest.warns(UserWarning, match="record 1 is skipped.*'UniLast' does not occur"):
        requests = read_requests(write([ZSRE, {**ZSRE, "subject": "UniLast"}]))
    assert len(requests) == 1


@pytest.mark.parametrize("text", ["[{", "nothing", '{"prompt": 1}\n{'])
def test_a_file_that_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match="broken.json"):
        read_requests(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no file of requests at .*nowhere.json"):
        read_requests(tmp_path / "nowhere.json")


def test_texts_of_every_form(write, tmp_path):
    records = [{"Corpus": "C4", "Text": "One two."}, {"Corpus": "C4", "Text": "Three four."}]
    assert read_texts(write(records)) == ["One two.", "Three four."]
    assert read_texts(write(records), limit=1) == ["One two."]
    lines = tmp_path / "texts.txt"
    lines.write_text("One two.\n\n  Three four. \n", encoding="utf-8")
    assert read_texts(lines) == ["One two.", "Three four."]
    assert len(read_texts("miniworld", limit=5)) == 5
    assert len(read_texts("miniworld-training", limit=7)) == 7


def test_the_embedded_training_text_comes_as_documents_and_as_lines():
    documents, lines = read_texts("miniworld-training"), read_texts("miniworld-training-lines")
    assert "\n".join(documents).split("\n") == lines and not any("\n" in line for line in lines)
    assert documents[0].count("\n") == 199 and len(documents) == -(-len(lines) // 200)


@pytest.mark.parametrize("record", ["One two.", {"text": "One two."}, {"Text": " "}, {"Text": 3}])
def test_what_holds_no_text_is_named(write, record):
    with pytest.raises(RequestError, match="requests.json, record 1: .*field Text"):
        read_texts(write([{"Text": "One two."}, record]))


def test_a_missing_file_of_texts_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no file of texts at .*nowhere.json; embedded ones: miniworld"):
        read_texts(tmp_path / "nowhere.json")


def test_the_real_perplexity_texts(shared):
    for path in sorted((shared / "data").rglob("ME-PPL*.json")):
        assert len(read_texts(path, limit=50)) == 50


def test_cut_out_takes_whole_words_and_the_last_of_them():
    assert cut_out("Also Al works", "Al") == "Also {} works"
    assert cut_out("The Beatles' first album by The Beatles is", "The Beatles") == "The Beatles' first album by {} is"
    assert cut_out("Zürich, Zürich is", "Zürich") == "Zürich, {} is"
    assert cut_out("C++ (v.2) is", "C++ (v.2)") == "{} is"
    assert cut_out("unforgettable", "forget") == "un{}table"


@pytest.mark.parametrize(
    ("name", "n"), [("counterfact_500.json", 500), ("counterfact-edit.json", 10_000), ("known_1000.json", 1209)]
)
def test_the_real_files(shared, name, n):
    path = shared / "data" / "counterfact" / name
    records = json.loads(path.read_text(encoding="utf-8"))
    requests = read_requests(path)
    assert len(requests) == n
    for record, request in zip(records, requests, strict=True):
        if "requested_rewrite" in record:
            assert request.prompt == record["requested_rewrite"]["prompt"]
            assert len(request.neighborhood_targets) == len(record["neighborhood_prompts"])
        else:
            assert request.text == record["prompt"]


@pytest.mark.parametrize("limit", [0, -5, 2.5, True])
@pytest.mark.parametrize("read", [read_requests, read_texts])
def test_a_limit_below_one_is_refused(read, limit):
    with pytest.raises(RequestError, match="limit must be a whole number from 1 on"):
        read("miniworld", limit=limit)


@pytest.mark.parametrize("read", [read_requests, read_texts])
def test_a_file_that_holds_nothing_is_refused(read, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(RequestError, match="none.json holds no"):
        read(tmp_path / "none.json")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x1c", "\v", "\f"])
def test_only_a_line_break_ends_a_line(tmp_path, mark):
    path = tmp_path / "requests.jsonl"
    subject = f"Ann{mark if mark >= ' ' else ''}B."  # JSON does not allow the others within a text
    path.write_text(json.dumps({**PLAIN, "subject": subject}, ensure_ascii=False) + "\r\n" + json.dumps(KNOWN))
    assert [request.subject for request in read_requests(path)] == [subject, "Vinson Massif"]
    texts = tmp_path / "texts.txt"
    texts.write_text(f"One{mark}two.\r\nThree.\rFour.\n")
    assert read_texts(texts) == [f"One{mark}two.", "Three.", "Four."]


@pytest.mark.parametrize("name", ["requests.json", "requests.jsonl", "texts.txt"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name):
    text = {"requests.json": json.dumps([PLAIN]), "requests.jsonl": json.dumps(PLAIN), "texts.txt": "One two."}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    if name == "texts.txt":
        assert read_texts(tmp_path / name) == ["One two."]
    else:
        assert read_requests(tmp_path / name) == [EditRequest("{} works as a", "Ann", "judge")]


def test_a_case_id_of_numpy_is_a_plain_number():
    request = EditRequest("{} is in", "Vouda", "Krela", case_id=np.int32(7))
    assert type(request.case_id) is int and request == EditRequest("{} is in", "Vouda", "Krela", case_id=7)
