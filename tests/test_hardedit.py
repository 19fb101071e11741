"""A set like HardEdit keeps its rules on any model: one-token words that open the prompt, targets the model denies."""

import json

import pytest
from typer.testing import CliRunner

import nbkit
from nbkit.__main__ import app
from nbkit.errors import RequestError
from nbkit.models.prompts import subject_kind
from nbkit.records.hardedit import Materials, Relation, common_words, materials, read_relations, relations_of
from nbkit.records.requests import EditRequest
from nbkit.studies.hardedit import LONG, TAKEN, TWICE, hardedit
from nbkit.studies.metrics import score_targets

RELATIONS = (
    Relation("country", ("{} is located in", "{} lies in"), ("Krela", "Sennifar", "Vouda")),
    Relation("plays", ("{} plays the",), ("drum", "harp", "drum")),
)
GIVEN = Materials(
    ("Vouda", "Ann", "Ann", "Krela", "I", "You", "unheardofword"), RELATIONS, frozenset({"Ann"}),
    {"words": "w.txt", "relations": "r.json", "requests": "none"},
)  # fmt: skip


def test_the_rules_hold_and_the_same_seed_gives_the_same(lm):
    made = hardedit(lm, GIVEN, n=9, seed=3, progress=False)
    requests = made.requests
    assert len({(one.prompt, one.subject) for one in requests}) == len({one.case_id for one in requests}) == 9
    said = score_targets(lm, [one.text for one in requests], [one.target_new for one in requests])["correct"]
    assert not said.any()
    targets = {relation.relation_id: relation.targets for relation in RELATIONS}
    for one in requests:
        assert one.prompt.startswith("{}") and subject_kind(lm, one) == "one-token first"
        assert one.subject not in GIVEN.taken and one.subject != one.target_new
        others = targets[one.relation_id]
        scores = score_targets(lm, [one.text] * len(others), others)["probability"]
        assert one.target_true == others[int(scores.argmax())] and one.target_new in others
        assert len(one.paraphrase_prompts) == (one.relation_id == "country")
    words = [one.subject for one in requests]
    assert len(set(words[: made.usable])) == made.usable, "each word once before any twice"
    assert made.dropped[TWICE] == made.dropped[TAKEN] == 1 and made.dropped[LONG] >= 1
    assert hardedit(lm, GIVEN, n=9, seed=3).requests == requests
    assert hardedit(lm, GIVEN, n=9, seed=4).requests != requests


def test_too_many_are_refused_with_what_there_is(tiny):
    with pytest.raises(RequestError, match=r"only \d+ of 99 requests can be made of \d words and 3 templates.*dropped"):
        hardedit(tiny, GIVEN, n=99)
    with pytest.raises(RequestError, match="n must be a whole number from 1 on"):
        hardedit(tiny, GIVEN, n=0)


def test_relations_and_words_of_requests():
    requests = [
        EditRequest("{} is in", "Vouda", " Krela", "Sennifar", relation_id="b"),
        EditRequest("The town of {} is in", "Vouda", "Raf", "Krela", relation_id="b"),
        EditRequest("Now {} plays", "Ann", "drum", "harp", relation_id="a"),
    ]
    assert relations_of(requests) == [Relation("b", ("{} is in",), ("Krela", "Sennifar", "Raf"))]
    with pytest.raises(
        RequestError, match="these 1 requests give no relation with a prompt that opens.*targets; give a"
    ):
        relations_of(requests[2:])
    with pytest.raises(RequestError, match="since none of them has a relation_id"):
        relations_of([EditRequest("{} is in", "Vouda", "Krela")])
    texts = ["The Vouda drum of the hill", "the hill, a hill"]
    assert common_words(texts, requests, at_least=1) == ["hill", "the", "The", "of"]
    assert common_words(texts, requests, at_least=3) == ["hill"]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([5], "record 0: expected an object"),
        ([{"templates": []}], "record 0: the field 'relation_id' is missing"),
        ([{"relation_id": "a", "templates": ["x {}"], "targets": ["b", "c"]}], "must open with {}"),
        ([{"relation_id": "a", "templates": ["{} {} is"], "targets": ["b", "c"]}], "no other {}"),
        ([{"relation_id": "a", "templates": "{} is", "targets": ["b", "c"]}], "templates must be a list of texts"),
        ([{"relation_id": "a", "templates": ["{} is"], "targets": ["b", "b"]}], "two different targets"),
        ([{"relation_id": "a", "templates": [], "targets": ["b", "c"]}], "0 templates"),
        ([], "holds no relation"),
    ],
)
def test_a_file_of_relations_that_cannot_be_used_is_refused(tmp_path, records, said):
    (tmp_path / "r.json").write_text(json.dumps(records))
    with pytest.raises(RequestError, match=said.replace("{", r"\{").replace("}", r"\}")) as refused:
        read_relations(tmp_path / "r.json")
    assert "r.json" in str(refused.value)


def test_a_model_without_a_world_needs_files():
    with pytest.raises(RequestError, match="'gpt2-xl' is no embedded model.*--words"):
        materials("gpt2-xl", requests="miniworld")


def test_the_command_writes_a_set_and_its_card(tmp_path):
    out = tmp_path / "hard.json"
    words = ["--model", "miniworld-gpt2", "--n", "6", "--seed", "1", "--out", str(out)]
    result = CliRunner().invoke(app, ["hardedit", *words])
    assert result.exit_code == 0, result.output
    requests, lm = nbkit.read_requests(out), nbkit.load("miniworld-gpt2")
    facts = {fact.subject for fact in nbkit.read_requests("miniworld-facts")}
    assert len(requests) == 6 and not facts & {one.subject for one in requests}
    assert {subject_kind(lm, one) for one in requests} == {"one-token first"}
    card = out.with_suffix(".md").read_text("utf-8")
    assert card.startswith("# hard\n\n6 edit requests") and "| n, seed | 6, 1 |" in card and LONG in card
    before = out.read_bytes()
    assert CliRunner().invoke(app, ["hardedit", *words]).exit_code == 0 and out.read_bytes() == before
    refused = CliRunner().invoke(app, ["hardedit", *words[:-1], str(tmp_path / "hard.txt")])
    assert "ends in .json" in str(refused.exception)
