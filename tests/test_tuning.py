"""Every method's settings on the embedded models are chosen by one rule, of equally many, unreported requests."""

import json
import tomllib
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import nbkit
from miniworld import tuning
from miniworld.commands import app
from miniworld.efficacy import KINDS, unreported_requests
from miniworld.tuning import (
    ALL_KINDS,
    SHARES,
    TAKEN_ELSEWHERE,
    TUNED,
    card_of_tuning,
    choose,
    chosen_lines,
    draws,
    held_out_requests,
    scores,
    space_of,
    training_of_mend,
    tune,
)
from nbkit import paths
from nbkit.batch.parameters import declared
from nbkit.errors import MethodError, RequestError
from nbkit.methods import METHODS, hparams
from nbkit.methods.hparams import hyper_parameters, tuned
from nbkit.methods.mend.recipe import recipe_of
from nbkit.models.prompts import subject_kind
from nbkit.records.results import Store
from nbkit.studies.method_study import MethodStudy
from nbkit.studies.metrics import edit_metrics, perplexity, score_targets

NOTEBOOKS = sorted((paths.ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def shipped():
    return nbkit.load("miniworld-gpt2", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def known_once(shipped):
    """Which facts the model knows is asked once for all tests."""
    known = tuning.unreported_facts(shipped)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "unreported_facts", lambda lm: known)
        yield


@pytest.fixture(scope="module")
def requests_of(shipped):
    return held_out_requests(shipped, 4)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    """The last three held-out texts."""
    monkeypatch.setattr(tuning, "N_TEXTS", 3)


# --- the rule ---------------------------------------------------------------------------------------------------------


def settings_of(*shares: tuple[float, ...], ratio: tuple[float, ...] | None = None) -> pd.DataFrame:
    """Settings with four edits each, of these shares (efficacy, paraphrase, neighborhood, perplexity kept)."""
    rows = []
    for number, of_setting in enumerate(shares):
        for edit in range(4):
            *said, kept = (float(edit < 4 * share) for share in of_setting)
            grown = (1.0 if ratio is None else ratio[number]) if kept else 2.0
            row = {"method": "ft", "setting": number, "hyper_parameters": "{}", "seconds": 1.0, "refused": ""}
            row |= {"perplexity": 10 * grown, "perplexity_before": 10.0, **dict(zip(SHARES[:3], said, strict=True))}
            rows.append(row)
    return scores(pd.DataFrame(rows))


def test_the_score_is_the_harmonic_mean_of_the_four_shares():
    table = settings_of((1.0, 0.5, 0.5, 1.0), (1.0, 0.25, 1.0, 0.5))
    assert table[SHARES].to_numpy().tolist() == [[1, 0.5, 0.5, 1], [1, 0.25, 1, 0.5]]
    assert table["score"].tolist() == pytest.approx([4 / (1 + 2 + 2 + 1), 4 / (1 + 4 + 1 + 2)])
    assert choose(table)["setting"] == 0


def test_a_setting_good_in_all_shares_is_chosen_before_one_that_fails_in_one():
    assert choose(settings_of((1, 1, 1, 0.25), (0.75, 0.75, 0.75, 0.75)))["setting"] == 1
    assert choose(settings_of((1, 1, 0, 1), (0.25, 0.25, 0.25, 0.25)))["setting"] == 1


def test_of_equal_scores_the_smaller_median_of_perplexity_counts_and_then_the_earlier():
    alike = (0.5, 1.0, 1.0, 1.0), (1.0, 1.0, 0.5, 1.0), (1.0, 0.5, 1.0, 1.0)
    assert choose(settings_of(*alike, ratio=(1.05, 1.02, 1.03)))["setting"] == 1
    assert choose(settings_of(*alike, ratio=(1.05, 1.02, 1.02)))["setting"] == 1
    assert choose(settings_of(*alike))["setting"] == 0


@pytest.mark.parametrize("wreck", [np.nan, np.inf, 11.0])
def test_a_perplexity_that_is_no_number_counts_as_one_that_has_risen(wreck):
    rows = pd.DataFrame({"method": "ft", "setting": [0, 0, 1, 1], "perplexity": [10.0, wreck, 10.9, 10.9]})
    rows = rows.assign(hyper_parameters="{}", seconds=1.0, refused="", perplexity_before=10.0)
    rows = rows.assign(**dict.fromkeys(SHARES[:3], 1.0))
    table = scores(rows)
    assert table["perplexity_kept"].tolist() == [0.5, 1.0] and choose(table)["setting"] == 1
    assert table["largest_ratio"][0] == pytest.approx(1.1 if wreck == 11 else np.inf)


def test_where_no_setting_has_all_shares_the_default_stays():
    table = settings_of((0, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0))
    assert (table["score"] == 0).all() and choose(table)["setting"] == 0


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_every_method_that_is_not_trained_has_a_space_of_what_it_can_be_given():
    spaces = tomllib.loads(tuning.SEARCH.read_text(encoding="utf-8"))
    assert set(spaces) == set(TUNED) == set(METHODS) - {"mend"}
    for method, space in spaces.items():
        assert set(space) <= {field.name for field in fields(METHODS[method].parameters)}


@pytest.mark.parametrize("model", ["miniworld-gpt2", "miniworld-llama"])
def test_all_methods_get_equally_many_different_settings_the_default_first(model):
    lm = nbkit.load(model, device="cpu")
    for method in TUNED:
        settings, default = draws(lm, method, 24), hyper_parameters(lm, method)
        assert len({json.dumps(setting) for setting in settings}) == 24
        assert hyper_parameters(lm, method, **settings[0]) == default
        assert settings == draws(lm, method, 24) != draws(lm, method, 24, seed=1)
        assert settings[:5] == draws(lm, method, 5), "a smaller budget has the first of them"


def test_draws_cover_the_space(shipped):
    drawn = pd.DataFrame(draws(shipped, "rome", 24)[1:])
    space = space_of("rome")
    assert drawn["layer"].value_counts().reindex(space["layer"]).ge(2).all(), "every layer is tried"
    rate = space["v_lr"]
    assert drawn["v_lr"].between(rate["from"], rate["to"]).all()
    below = (drawn["v_lr"] < np.sqrt(rate["from"] * rate["to"])).mean()
    assert 0.35 < below < 0.65, "evenly on a log scale"


def test_what_cannot_be_drawn_is_refused_with_what_to_do(shipped, tmp_path, monkeypatch):
    with pytest.raises(MethodError, match="recipes.toml"):
        draws(shipped, "mend", 2)
    with pytest.raises(MethodError, match="unknown method 'room'"):
        draws(shipped, "room", 2)
    monkeypatch.setattr(tuning, "SEARCH", tmp_path / "search.toml")
    tuning.SEARCH.write_text("[rome]\nlayer = [1, 2]\n[kn]\nlayer = [1]\n[emmet]\nlayers = [[9]]\n")
    with pytest.raises(MethodError, match=r"no table \[ft\].*say there"):
        draws(shipped, "ft", 2)
    with pytest.raises(MethodError, match="of rome there are 2 different settings .* the budget is 3: all methods"):
        draws(shipped, "rome", 3)
    with pytest.raises(MethodError, match="kn has no hyper-parameter layer"):
        draws(shipped, "kn", 2)
    with pytest.raises(nbkit.errors.ModelError, match="layer 9"):
        draws(shipped, "emmet", 2)


# --- the requests -----------------------------------------------------------------------------------------------------


def test_the_requests_are_about_no_subject_that_a_notebook_asks_about(requests_of):
    read = [declared(path)["data"].default for path in NOTEBOOKS if "data" in declared(path)]
    names = {name for one in read for name in ([one] if isinstance(one, str) else one)}
    assert {"miniworld", "miniworld-questions"} <= names
    asked = [request for name in names for request in nbkit.read_requests(name)]
    assert not {one.subject for one in requests_of} & {one.subject for one in asked}
    assert not {one.text for one in requests_of} & {one.text for one in asked}


def test_nor_are_they_those_that_cards_report(shipped, requests_of):
    reported = unreported_requests(shipped, TAKEN_ELSEWHERE, kinds=ALL_KINDS)
    assert len(reported) == 3 * TAKEN_ELSEWHERE
    assert not {one.case_id for one in requests_of} & {one.case_id for one in reported}


def test_they_and_their_neighbours_are_known_and_none_opens_with_a_subject_of_one_token(shipped, requests_of):
    assert [subject_kind(shipped, request) for request in requests_of] == [kind for kind in KINDS for _ in range(4)]
    assert all(one.paraphrase_prompts and one.neighborhood_prompts for one in requests_of)
    assert edit_metrics(shipped, requests_of)["neighborhood_argmax"].eq(1).all()
    texts, answers = [one.text for one in requests_of], [one.target_true for one in requests_of]
    assert score_targets(shipped, texts, answers)["correct"].all()
    subjects = {fact.subject for fact in nbkit.read_requests("miniworld-facts")}
    asked = [(one.text, *one.paraphrase_prompts, *one.neighborhood_prompts) for one in requests_of]
    for text in [text for texts in asked for text in texts]:
        opening = max((subject for subject in subjects if text.startswith(subject)), key=len, default=None)
        if opening is not None:
            prompt = "{}" + text.removeprefix(opening)
            assert subject_kind(shipped, nbkit.EditRequest(prompt, opening, "a")) != "one-token first", text


def test_other_seeds_draw_others_and_too_many_are_refused(shipped, requests_of):
    assert held_out_requests(shipped, 4) == requests_of != held_out_requests(shipped, 4, seed=1)
    with pytest.raises(RequestError, match="knows .* held-out facts"):
        held_out_requests(shipped, 10_000)


# --- all of it --------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_what_the_edits_do_and_nothing_is_measured_twice(shipped, tmp_path, monkeypatch):
    store = Store(tmp_path)
    table = tune(shipped, ["ft"], budget=2, n=1, store=store)
    requests, texts = held_out_requests(shipped, 1), nbkit.read_texts("miniworld")[-3:]
    assert table["setting"].tolist() == [0, 1] and table["n"].tolist() == [2, 2] and table["chosen"].sum() == 1
    for row in table.to_dict("records"):
        made = nbkit.edit(shipped, requests, "ft", **json.loads(row["hyper_parameters"]))
        expected = edit_metrics(shipped, requests, edits=made)[SHARES[:3]].mean()
        assert [row[share] for share in SHARES[:3]] == pytest.approx(expected.tolist())
        ratio = perplexity(shipped, texts, edits=made) / perplexity(shipped, texts)
        assert row["largest_ratio"] == pytest.approx(ratio.max()) and row["perplexity_kept"] == (ratio < 1.1).mean()
    assert set(nbkit.results("tuning", store=store)["method"]) == {"ft"}

    calls, measured = [], tuning.measured

    def counted(study, *arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(study.hparams)
        yield from measured(study, *arguments)

    monkeypatch.setattr(tuning, "measured", counted)
    pd.testing.assert_frame_equal(tune(shipped, ["ft"], budget=2, n=1, store=store), table)
    assert not calls, "all was there"
    with pytest.raises(KeyboardInterrupt):
        tune(shipped, ["ft"], budget=4, n=1, store=store)
    monkeypatch.setattr(tuning, "measured", lambda *given: calls.append(given[0].hparams) or measured(*given))
    more = tune(shipped, ["ft"], budget=4, n=1, store=store)
    assert calls == draws(shipped, "ft", 4)[2:], "the first two were there, the third was when it was interrupted"
    pd.testing.assert_frame_equal(more.iloc[:2][list(SHARES)], table[list(SHARES)])


def test_a_method_that_is_itself_only_in_batches_edits_them_in_batches(shipped, requests_of, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "BATCH", 5)
    setting = {"layers": [6], "n_steps": 1}
    study = MethodStudy(shipped, "locft-bf", None, None, Store(tmp_path), setting)
    made = tuning.edits_for(study, requests_of)
    assert [len(one.requests) for one in made] == [5] * 5 + [3] * 3 and len(requests_of) == 8
    (name,) = made[5].deltas
    whole = nbkit.edit_batch(shipped, requests_of[5:], "locft-bf", progress=False, **setting)
    torch.testing.assert_close(made[5].deltas[name].dense(), whole.deltas[name].dense())


def test_a_setting_that_a_method_refuses_takes_its_place_and_is_never_chosen(shipped, tmp_path, monkeypatch):
    def refusing(study, requests):
        raise MethodError("no eigenvalue is below")

    monkeypatch.setattr(tuning.MethodStudy, "edits", refusing)
    table = tune(shipped, ["ft"], budget=2, n=1, store=Store(tmp_path))
    assert table["score"].isna().all() and table["refused"].eq("no eigenvalue is below").all()
    assert table["chosen"].tolist() == [True, False] and (table["perplexity_kept"] == 0).all()
    taken = pd.concat([table, settings_of((0.25, 0.25, 0.25, 0.25))], ignore_index=True)
    assert choose(taken).name == 2


def test_the_command_writes_all_settings_and_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(tuning, "TUNED", ("ft", "kn"))
    asked = ["tune", "miniworld-gpt2", "--budget", "2", "--requests", "1", "--out", str(tmp_path / "out")]
    only_printed = CliRunner().invoke(app, [*asked, "--method", "kn"], catch_exceptions=False)
    assert only_printed.exit_code == 0 and "[kn]\nsource" in only_printed.output
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
    folder = tmp_path / "out" / "miniworld-gpt2"
    table = pd.read_csv(folder / "tuning.csv")
    assert table.groupby("method")["chosen"].agg(["size", "sum"]).loc[["ft", "kn"]].to_numpy().tolist() == [[2, 1]] * 2
    card = (folder / "tuning.md").read_text(encoding="utf-8")
    assert "| 3000 | 30000 |" in card and "$" not in card
    lm = nbkit.load("miniworld-gpt2", device="cpu")
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(hparams, "embedded_models", lambda: ["miniworld-gpt2"])
    (tmp_path / "data").mkdir()
    (tmp_path / "out").rename(tmp_path / "data" / "models")
    for method in ("ft", "kn"):
        chosen = json.loads(table.query("method == @method and chosen")["hyper_parameters"].item())
        assert tuned(lm, method) == chosen
        hyper_parameters(lm, method, **chosen)
    assert tuned(lm, "rome") == {}, "which was not asked for"
    for method, said in (("mend", "trained"), ("room", "unknown method")):
        refused = CliRunner().invoke(app, [*asked, "--method", method])
        assert refused.exit_code == 2 and said in refused.output


@pytest.mark.parametrize("model", ["miniworld-gpt2", "miniworld-llama"])
def test_what_models_come_with_is_what_the_rule_chooses_of_their_tables(model):
    lm, table = nbkit.load(model, device="cpu"), pd.read_csv(paths.DATA / "models" / model / "tuning.csv")
    assert set(table["method"]) == set(TUNED) and table.groupby("method").size().nunique() == 1
    for method, of_method in table.groupby("method"):
        chosen = json.loads(choose(of_method)["hyper_parameters"])
        assert tuned(lm, method) == chosen == json.loads(of_method.loc[of_method["chosen"], "hyper_parameters"].item())
        assert set(chosen) == set(space_of(method))
        hyper_parameters(lm, method, **chosen)


def test_the_training_of_mend_is_told_from_its_log(shipped, tmp_path, monkeypatch):
    told = training_of_mend(shipped)
    log = paths.DATA / "models" / "miniworld-gpt2" / "mend_training_log.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert told["steps"] == recipe_of("miniworld-gpt2")[0].n_steps == 3000
    assert told["seconds"] == max(record["seconds"] for record in records)
    monkeypatch.setattr(paths, "DATA", tmp_path)
    assert training_of_mend(shipped) is None
    table = settings_of((1, 1, 1, 1)).assign(chosen=True, budget=1, seed=0)
    assert "none is trained" in card_of_tuning(shipped, table)
    assert chosen_lines(table, shipped.name).startswith("[ft]\nsource = ")
