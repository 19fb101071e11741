"""The made-up world: its facts, its files, and what training may not see."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from miniworld.corpus import lines
from miniworld.files import held_out, held_out_items, held_out_texts, write_files
from miniworld.task_items import KINDS, open_questions
from miniworld.text import question
from miniworld.world import build_world
from nbkit import paths
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import subject_kind, target_ids, tokenize
from nbkit.records.requests import EditRequest, read_requests, read_texts

N_TRAINING_LINES = 100_000  # one shard of the training text


@pytest.fixture(scope="module")
def lm(make_lm, world_tokenizer) -> LanguageModel:
    """A random model that reads with the world's tokenizer."""
    return LanguageModel.wrap(make_lm("gpt2", n_positions=256).model, world_tokenizer, "random")


@pytest.fixture(scope="module")
def requests():
    return read_requests("miniworld")


def items(kind: str, split: str) -> list[dict]:
    text = (paths.DATA / "tasks" / kind / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prefixes(line: str):
    """Every start of a line that ends at a word's end."""
    for index, character in enumerate(line):
        if character == " ":
            yield line[:index]
    yield line


def test_a_seed_is_a_world(world):
    assert build_world() == world
    assert build_world(seed=1) != world


def test_there_are_enough_facts_relations_and_templates(world):
    relations = {fact.relation for fact in world.facts}
    assert len(world.facts) >= 5000 and len(relations) >= 10
    for relation in relations:
        assert len(set(relation.templates)) == len(relation.templates) >= 3
        assert all(template.count("{}") == 1 for template in (*relation.templates, relation.question))
        opening = [template.startswith("{}") for template in relation.templates]
        assert any(opening) and not all(opening)
    assert len({(fact.subject, fact.relation.relation_id) for fact in world.facts}) == len(
        world.facts
    )  # one answer each


def test_no_name_is_shared_by_two_subjects(world):
    names = [name for names in world.subjects.values() for name in names]
    assert len(names) == len(set(names))


def test_every_object_is_one_token_behind_a_space(world, lm):
    objects = sorted({fact.object for fact in world.facts})
    assert {name: len(target_ids(lm, name)) for name in objects} == dict.fromkeys(objects, 1)


def test_subjects_are_of_one_and_of_several_tokens(world, world_tokenizer):
    def n_tokens(text: str) -> int:
        return len(world_tokenizer(text).input_ids)

    single = set(world.single_token_names)
    assert {name for name in single if n_tokens(name) > 1 or n_tokens(" " + name) > 1} == set()
    others = {name for names in world.subjects.values() for name in names} - single
    whole = {name for name in others if n_tokens(name) == 1}
    assert whole <= set(world.frequent_names)  # a name shown behind a space may become whole without one too
    assert len(whole) < 0.02 * len(others) and len(single) >= 100 and len(others) >= 100


def test_the_tokenizer_is_the_same_every_time_and_loses_nothing(world, world_tokenizer):
    text = "\n".join(islice(lines(world, 5), 200))
    assert world_tokenizer.decode(world_tokenizer(text).input_ids) == text
    assert not set(world_tokenizer(text).input_ids) & set(world_tokenizer.all_special_ids)


def test_the_committed_files_are_what_the_generator_writes(world, tmp_path):
    write_files(world, tmp_path)
    written = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(written) == 5 + 2 * len(KINDS)
    for path in written:
        assert (paths.DATA / path).read_bytes() == (tmp_path / path).read_bytes(), f"{path} is not the generator's"


def test_the_requests_have_a_third_of_each_kind_of_subject(lm, requests):
    counts = Counter(subject_kind(lm, request) for request in requests)
    third = len(requests) / 3  # but for the few names that became one token without being meant to
    assert counts == pytest.approx(dict.fromkeys(["one-token first", "several-token first", "later"], third), rel=0.02)
    assert len({request.case_id for request in requests}) == len(requests) >= 600


def test_some_targets_are_of_two_tokens_and_the_same_facts(lm, requests):
    """Their article is the relation's own, and prompts and targets together say what they say without it."""
    longer = [request for request in requests if " " in request.target_new]
    assert 0.06 < len(longer) / len(requests) < 0.12
    assert {request.relation_id for request in longer} == {"instrument", "sights", "currency"}
    for request in longer:
        article = "its" if request.relation_id == "sights" else "the"
        assert [target.split()[0] for target in (request.target_new, request.target_true)] == [article] * 2
        assert len(lm.tokenizer(f" {request.target_new}").input_ids) == 2
        assert not any(prompt.endswith(article) for prompt in (request.prompt, *request.paraphrase_prompts))
    for relation_id in ("instrument", "sights", "currency"):
        of_relation = [" " in request.target_new for request in requests if request.relation_id == relation_id]
        assert 0.4 <= sum(of_relation) / len(of_relation) <= 0.6


def in_one_form(request: EditRequest) -> EditRequest:
    """A request whose article, if it asks for one, is back in the prompts."""
    article, _, new = request.target_new.rpartition(" ")
    if not article:
        return request
    changes = {"prompt": f"{request.prompt} {article}", "target_new": new,
               "target_true": request.target_true.removeprefix(f"{article} "),
               "neighborhood_targets": tuple(t.removeprefix(f"{article} ") for t in request.neighborhood_targets)}
    for name in ("paraphrase_prompts", "neighborhood_prompts"):
        changes[name] = tuple(f"{prompt} {article}" for prompt in getattr(request, name))
    return dataclasses.replace(request, **changes)  # fmt: skip


def test_requests_ask_for_something_false(world, requests):
    truth = {(fact.subject, fact.relation.relation_id): fact.object for fact in world.facts}
    objects = {}
    for fact in world.facts:
        objects.setdefault(fact.relation.relation_id, set()).add(fact.object)
    for request in map(in_one_form, requests):
        assert truth[request.subject, request.relation_id] == request.target_true != request.target_new
        assert request.target_new in objects[request.relation_id]


def test_neighbors_share_relation_and_object_and_not_the_subject(world, requests):
    facts = {template.replace("{}", fact.subject): fact for fact in world.facts for template in fact.relation.templates}
    for request in map(in_one_form, requests):
        assert 1 <= len(request.neighborhood_prompts) == len(request.neighborhood_targets)
        for prompt, target in zip(request.neighborhood_prompts, request.neighborhood_targets, strict=True):
            fact = facts[prompt]
            assert fact.relation.relation_id == request.relation_id
            assert fact.object == request.target_true == target and fact.subject != request.subject


def test_paraphrases_are_other_statements_of_the_same_fact(world, requests):
    templates = {fact.relation.relation_id: fact.relation.templates for fact in world.facts}
    for request in map(in_one_form, requests):
        filled = {template.replace("{}", request.subject) for template in templates[request.relation_id]}
        plain, behind = request.paraphrase_prompts
        assert request.text in filled and plain in filled - {request.text}
        assert any(behind.endswith(" " + text) for text in filled - {request.text, plain})


def test_questions_are_the_same_edits_and_never_open_with_their_subject(world, lm, requests):
    facts = {(fact.subject, fact.relation.relation_id): fact for fact in world.facts}
    asked_of = {question(fact): fact for fact in world.facts}
    for request, asked in zip(map(in_one_form, requests), read_requests("miniworld-questions"), strict=True):
        same = ("case_id", "subject", "target_new", "target_true")
        assert [getattr(asked, name) for name in same] == [getattr(request, name) for name in same]
        fact = facts[request.subject, request.relation_id]
        assert asked.text == question(fact) and subject_kind(lm, asked) == "later"
        (restated,), (loc,) = asked.paraphrase_prompts, asked.neighborhood_prompts
        assert restated in {template.replace("{}", fact.subject) for template in fact.relation.templates[2:]}
        assert not restated.startswith(fact.subject)
        other = asked_of[loc]
        assert asked.neighborhood_targets == (other.object,)
        assert other.subject != fact.subject and other.relation != fact.relation and other.object != fact.object


def test_facts_are_read_too(world):
    facts = read_requests(paths.DATA / "miniworld" / "facts.json")
    assert [(fact.subject, fact.target_true) for fact in facts] == [(fact.subject, fact.object) for fact in world.facts]


def test_training_never_sees_what_is_held_out(world):
    """Neither a held-out text as a line, nor a held-out prompt at the start of one, nor a held-out question."""
    texts = {record["Text"] for record in held_out_texts(world)}
    prompts = {item["prompt"] for asked in held_out_items(world).values() for item in asked}
    assert held_out(world) == texts | prompts
    prompts |= {question(fact) for fact in open_questions(world)[1]}
    for line in islice(lines(world, 1000, held_out(world)), N_TRAINING_LINES):
        assert line not in texts
        assert prompts.isdisjoint(prefixes(line)), line


def test_the_text_for_second_moments_holds_nothing_held_out_either(world):
    prompts = {item["prompt"] for asked in held_out_items(world).values() for item in asked}
    texts = set(read_texts("miniworld"))
    for line in read_texts("miniworld-training-lines"):
        assert line not in texts and prompts.isdisjoint(prefixes(line))


def test_some_training_items_are_seen(world):
    """The check above would pass on a text without tasks."""
    asked = {item["prompt"] for kind in KINDS for item in items(kind, "train")}
    text = islice(lines(world, 1000, held_out(world)), 20_000)
    assert sum(any(start in asked for start in prefixes(line)) for line in text) > 10


def test_the_open_questions_are_split_in_two(world):
    asked, kept = (set(facts) for facts in open_questions(world))
    assert asked.isdisjoint(kept) and asked | kept == set(world.facts) and len(kept) == len(world.facts) // 10
    kept_questions = {question(fact) for fact in kept}
    assert {item["prompt"] for item in items("open_qa", "held_out")} <= kept_questions
    assert kept_questions.isdisjoint(item["prompt"] for item in items("open_qa", "train"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_has_items_to_train_on_and_others_held_out(kind, lm):
    train, kept = items(kind, "train"), items(kind, "held_out")
    prompts = [item["prompt"] for item in train + kept]
    assert len(train) >= 100 and len(kept) >= 100
    assert len(prompts) == len(set(prompts))
    for item in train + kept:
        answers = item["choices"] if "choices" in item else [item["answer"]]
        assert len(set(answers)) == len(answers) and all(answers)
        assert 0 <= item.get("gold", 0) < len(answers)
        tokenize(lm, [f"{item['prompt']} {answer}" for answer in answers])  # fits into the context


def test_the_texts_for_perplexity_are_in_me_ppl_s_schema(lm):
    records = json.loads((paths.DATA / "miniworld" / "perplexity.json").read_text(encoding="utf-8"))
    assert all(set(record) == {"Corpus", "Text"} for record in records)
    texts = read_texts("miniworld")
    assert texts == [record["Text"] for record in records] and len(set(texts)) == len(texts) >= 200
    assert min(len(row) for row in tokenize(lm, texts)) >= 2


def test_its_commands_are_there():
    run = subprocess.run([sys.executable, "data/miniworld", "--help"], cwd=paths.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in ("train", "card"))
