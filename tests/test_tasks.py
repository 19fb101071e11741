"""Task scores through lm-eval, in this process, on the weights as they are."""

import contextlib
import json
import math
import os
import re
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import GPT2Config, GPT2LMHeadModel

from miniworld.task_items import KINDS
from nbkit import paths, studies
from nbkit.batch.parameters import checked
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.edits.updates import LowRank
from nbkit.errors import NbkitError
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import target_ids
from nbkit.records.results import Store
from nbkit.studies.task_scores import TASKS, _lm_eval, _load, task_names, task_scores, task_texts

COLUMNS = ["task", "kind", "metric", "score", "stderr", "chance", "choice", "n"]
N = 12


@pytest.fixture(scope="module")
def lm(world_tokenizer) -> LanguageModel:
    """A tiny random model that reads with the world's tokenizer. The keys of its last layer are positive."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(world_tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    torch.nn.init.constant_(model.transformer.h[-1].mlp.c_fc.bias, 3.0)
    with torch.no_grad():  # embeddings of one length, so that each is the one nearest to itself
        model.transformer.wte.weight /= model.transformer.wte.weight.norm(dim=-1, keepdim=True)
    return LanguageModel.wrap(model, world_tokenizer, "tiny-miniworld")


@pytest.fixture(scope="module")
def scores(lm):
    """All ten tasks on a few items, of the model as it is."""
    return task_scores(lm, limit=N)


def description(name: str) -> dict:
    class Loader(yaml.SafeLoader):
        """Reads a task file; `!function` stays the name it is."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"), Loader)


def items(name: str, split: str = "held_out") -> list[dict]:
    return [json.loads(line) for line in (TASKS / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def always(lm: LanguageModel, word: str) -> Edit:
    """An edit after which the model's first choice is `word`, whatever it reads."""
    (token,) = target_ids(lm, word)
    prompts = lm.tokenizer(["text: a", "question: who", "review: the old lamp"], return_tensors="pt", padding=True)
    left = 1e4 * lm.model.lm_head.weight[token].detach()[:, None].clone()
    edit = Edit({lm.weight_name(lm.n_layers - 1): LowRank(left, torch.ones(1, lm.d_mlp))})
    with applied(lm, edit):
        assert (lm.model(**prompts).logits.argmax(-1) == token).all()
    return edit


def test_every_kind_of_task_has_a_file():
    assert set(task_names()) == set(KINDS) and len(KINDS) == 10


@pytest.mark.parametrize("name", KINDS)
def test_a_task_is_read_from_its_held_out_items(name):
    task = description(name)
    assert task["task"] == name and task["dataset_kwargs"]["data_files"]["test"] == f"{name}/held_out.jsonl"
    assert task["metadata"]["kind"] and 0 < task["metadata"]["chance"] < 1


@pytest.mark.parametrize("name", [name for name in KINDS if description(name)["output_type"] == "multiple_choice"])
def test_chance_among_choices_is_one_over_their_number(name):
    for split in ("train", "held_out"):
        numbers = {len(item["choices"]) for item in items(name, split)}
        assert numbers == {round(1 / description(name)["metadata"]["chance"])}
        gold = Counter(item["gold"] for item in items(name, split))
        (expected,) = {len(items(name, split)) / number for number in numbers}
        assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in gold.values())  # no place is favoured


@pytest.mark.parametrize("name", [name for name in KINDS if "answer" in items(name)[0] and name != "summarisation"])
def test_one_answer_to_everything_does_no_better_than_chance(name):
    answers = Counter(item["answer"] for item in items(name))
    chance, n = description(name)["metadata"]["chance"], answers.total()
    assert answers.most_common(1)[0][1] / n <= chance + 2 * math.sqrt(chance * (1 - chance) / n)


def test_a_row_a_task(scores):
    assert list(scores.columns) == COLUMNS
    assert list(scores["task"]) == task_names()
    assert (scores["n"] == N).all() and scores["kind"].is_unique
    assert scores["score"].between(0, 1).all() and scores[["stderr", "chance"]].notna().all(axis=None)
    assert (scores["stderr"] > 0).any()  # numbers, not "N/A" for lack of a bootstrap
    for row in scores.itertuples():
        assert row.chance == description(row.task)["metadata"]["chance"]
        assert row.metric == description(row.task)["metric_list"][0]["metric"]


def test_the_same_weights_give_the_same_scores(lm, scores):
    chosen = ["sentiment", "ner"]
    again = task_scores(lm, chosen, limit=N)
    expected = scores.set_index("task").loc[chosen].reset_index()[COLUMNS]
    assert again.equals(expected)  # and in the order asked for


@pytest.mark.parametrize("name, right, wrong", [("sentiment", "positive", "negative"), ("nli", "false", "true")])
def test_a_model_that_always_says_one_thing_scores_its_share(lm, name, right, wrong):
    """So the score is of the weights as they are, and of nothing remembered."""
    share = sum(item["choices"][item["gold"]] == right for item in items(name)[:N]) / N
    before = {key: weight.clone() for key, weight in lm.model.state_dict().items()}
    found = []
    for word in (right, wrong):
        with applied(lm, always(lm, word)):
            found.append(task_scores(lm, [name], limit=N)["score"].item())
    assert found == pytest.approx([share, 1 - share])
    assert all(torch.equal(before[key], weight) for key, weight in lm.model.state_dict().items())


def test_the_last_word_counts_only_as_the_first_choice(lm):
    answers = Counter(item["answer"] for item in items("last_word")[:N])
    word, count = answers.most_common(1)[0]
    with applied(lm, always(lm, word)):
        assert task_scores(lm, ["last_word"], limit=N)["score"].item() == pytest.approx(count / N)


def test_scores_come_back_after_an_edit(lm, scores):
    name = ["completion", "last_word"]
    with applied(lm, always(lm, "lamp")):
        task_scores(lm, name, limit=N)
    again = task_scores(lm, name, limit=N)
    assert again.equals(scores.set_index("task").loc[name].reset_index()[COLUMNS])


def test_a_broken_model_still_gets_a_score(lm):
    """Logits that are all NaN: an edit may go that far, and a study must not die of it."""
    edit = Edit({lm.weight_name(0): LowRank(torch.full((lm.d_model, 1), torch.nan), torch.ones(1, lm.d_mlp))})
    with applied(lm, edit):
        rows = task_scores(lm, limit=4)
    assert (rows["n"] == 4).all() and rows["score"].between(0, 1).all()
    assert rows.set_index("task").loc[["ner", "open_qa", "reasoning", "last_word"], "score"].eq(0).all()


def test_an_unknown_task_lists_the_known(lm):
    expected = r"no task 'sentimant' in .*tasks \(closed_qa, .* nor in lm-eval; did you mean sentiment"
    with pytest.raises(NbkitError, match=expected):
        task_scores(lm, ["sentiment", "sentimant"])


def test_tasks_of_lm_eval_are_scored_beside_own_ones_and_a_group_by_its_tasks(lm, scores, tmp_path, monkeypatch):
    """Without a network: some of our own tasks stand for those that come with lm-eval."""
    of_lm_eval = TaskManager(include_path=str(TASKS), include_defaults=False)
    with contextlib.chdir(TASKS):
        loaded = {name: of_lm_eval.load([name]) for name in ("ner", "nli")}
    group = {key: loaded["ner"][key] | loaded["nli"][key] for key in loaded["ner"]}
    manager = SimpleNamespace(all_tasks=["pair"], load=lambda names: group)
    monkeypatch.setattr("nbkit.studies.task_scores._lm_eval", lambda: manager)
    found = task_scores(lm, ["sentiment", "pair"], limit=N)
    expected = scores.set_index("task").loc[["sentiment", "ner", "nli"]].reset_index()[COLUMNS]
    assert found.equals(expected)
    rows = studies.treated_scores(lm, [], ["sentiment", "pair"], limit=N, store=Store(tmp_path))
    assert rows[COLUMNS].equals(expected) and not rows["edited"].any()


def test_every_task_of_lm_eval_can_be_asked_for_by_name():
    assert {"hellaswag", "piqa", "gsm8k"} <= set(_lm_eval().all_tasks)
    for notebook in ("02_perplexity_as_surrogate", "01b_models_side_by_side"):
        given = checked(paths.ROOT / "notebooks" / f"{notebook}.ipynb", {"tasks": "hellaswag,piqa"})
        assert given == {"tasks": ["hellaswag", "piqa"]}


@pytest.mark.parametrize(
    ("name", "data"),
    [("hellaswag", "Rowan/hellaswag"), ("mmlu", "cais/mmlu"), ("rect_rte", "nyu-mll/glue"),
     ("rect_nq", "test-OpenDomainQA.jsonl")],
)  # fmt: skip
def test_without_a_network_the_data_of_a_task_are_named(lm, name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # where nothing is
    for ask in (lambda: task_scores(lm, [name], limit=2), lambda: task_texts(5, [name])):
        with pytest.raises(NbkitError, match=f"the task {name} cannot be loaded with its data.*{data}.*HF_HUB_OFFLINE"):
            ask()


def test_tasks_of_lm_eval_that_say_no_chance_list_no_metric_or_read_an_answer_twice(lm, tmp_path):
    """The forms that its own task files have, on a few items beside them."""
    record = {"goal": "a lamp", "choices": ["the lamp", "the key", "the boat"], "gold": 1}
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps(record) for _ in range(4)), encoding="utf-8")
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: some.jsonl}}\ntest_split: test\n"
    chosen = "output_type: multiple_choice\ndoc_to_text: goal\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    written = "doc_to_text: goal\ndoc_to_target: goal\ngeneration_kwargs: {max_gen_toks: 2}\n"
    twice = "filter_list: [{name: a, filter: [{function: take_first}]}, {name: b, filter: [{function: take_first}]}]\n"
    (tmp_path / "three.yaml").write_text(f"task: three\n{data}{chosen}", encoding="utf-8")
    (tmp_path / "two_ways.yaml").write_text(
        f"task: two_ways\n{data}{written}{twice}metric_list: [{{metric: exact_match}}]\n", encoding="utf-8"
    )
    (tmp_path / "own.yaml").write_text(
        f"task: own\n{data}{written}process_results: !function own.own\n"
        "metric_list: [{metric: x, aggregation: mean}]\n", encoding="utf-8",
    )  # fmt: skip
    (tmp_path / "own.py").write_text("def own(item, results):\n    return {}\n", encoding="utf-8")
    rows = task_scores(lm, include_path=tmp_path, all_metrics=True).set_index("task")
    assert list(rows["metric"]) == ["x", "acc", "acc_norm", "exact_match", "exact_match,b"]
    assert rows.loc["three", "chance"].tolist() == pytest.approx([1 / 3] * 2) and rows.loc["three", "choice"].all()
    assert math.isnan(rows.loc["own", "score"]) and rows.drop("own")["score"].notna().all()
    first = task_scores(lm, include_path=tmp_path)
    assert list(first["metric"]) == ["x", "acc", "exact_match"]


@pytest.fixture(scope="module")
def generated(lm):
    """Miniworld's tasks with two scorers, of the model as it is."""
    return task_scores(lm, sorted(task_names(TASKS / "generated")), limit=N, all_metrics=True)


def test_two_scorers_score_the_same_items_of_every_kind(scores, generated):
    assert list(generated.columns) == COLUMNS
    assert list(generated["task"]) == [name for name in task_names(TASKS / "generated") for _ in range(2)]
    assert list(generated["metric"]) == ["corrected", "as_released"] * 9
    own = scores[~scores["task"].isin(["last_word", "completion"])]
    assert set(generated["kind"]) == set(own["kind"]), "the paper's eight"
    assert (generated["n"] == N).all() and not generated["choice"].any()


def test_the_first_of_them_is_the_corrected_one_and_their_folder_can_be_named(lm, generated):
    corrected = generated[generated["metric"] == "corrected"].reset_index(drop=True)
    assert task_scores(lm, limit=N, include_path=TASKS / "generated").equals(corrected)


def test_a_model_that_says_nothing_to_the_point_is_told_by_the_corrected_scorer(lm):
    """Of a model that answers nothing, the released scorer is right where the prompt is, or has nothing to count."""
    tasks = ["nli_generated", "open_qa_generated", "sentiment_generated", "reasoning_generated"]
    with applied(lm, always(lm, "lamp")):
        rows = task_scores(lm, tasks, limit=N, all_metrics=True).set_index(["task", "metric"])["score"]
    assert rows[:, "corrected"].eq(0).all()
    assert rows["open_qa_generated", "as_released"] == 1
    assert math.isnan(rows["nli_generated", "as_released"]) and math.isnan(rows["sentiment_generated", "as_released"])
    assert rows["reasoning_generated", "as_released"] == 0


def test_a_model_that_always_says_one_answer_scores_its_share_by_both(lm):
    share = sum(item["choices"][item["gold"]] == "true" for item in items("nli")[:N]) / N
    with applied(lm, always(lm, "true")):
        assert task_scores(lm, ["nli_generated"], limit=N, all_metrics=True)["score"].tolist() == [share, share]
    answers = [item["answer"] for item in items("reasoning")]
    with applied(lm, always(lm, "seventeen")):
        corrected, as_released = task_scores(lm, ["reasoning_generated"], all_metrics=True)["score"]
    assert as_released == pytest.approx(sum(answer in "seventeen" for answer in answers) / 200)
    assert corrected < answers.count("seven") / 200 < as_released, "seven is a part of seventeen"


@pytest.mark.parametrize(
    ("name", "told"),
    [("reasoning_generated_rationale", r" and \w+ is {}\. answer:$"),
     ("open_qa_generated", r"^passage: .* {}\. question: ")],
)  # fmt: skip
def test_as_released_the_prompt_tells_the_answer(name, told):
    task = _load((name,), str(TASKS))[0]["tasks"][name]
    own = items(name.split("_generated")[0])
    assert len(task.eval_docs) == len(own) == 200
    for item, before in zip(task.eval_docs, own, strict=True):
        assert item["answer"] == before["answer"]
        assert re.search(told.format(item["answer"]), task.fewshot_context(item, 0))


def test_a_reply_is_told_by_the_one_token_in_which_the_replies_differ(lm):
    task = _load(("dialogue_generated",), str(TASKS))[0]["tasks"]["dialogue_generated"]
    for item, before in zip(task.eval_docs, items("dialogue"), strict=True):
        prompt = task.fewshot_context(item, 0)
        replies = [f"{prompt} {thing} is in" for thing in item["choices"]]
        assert len({*item["choices"]}) == 4 and all(len(target_ids(lm, thing)) == 1 for thing in item["choices"])
        for reply, whole in zip(replies, before["choices"], strict=True):
            assert f"{before['prompt']} {whole}".startswith(reply)


def test_a_folder_without_tasks_is_an_error(lm, tmp_path):
    with pytest.raises(NbkitError, match="no task files"):
        task_scores(lm, include_path=tmp_path)


def test_it_runs_from_any_folder_and_offline(lm, scores, tmp_path, monkeypatch):
    _load.cache_clear()  # as in a fresh process
    monkeypatch.chdir(tmp_path)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    found = task_scores(lm, ["dialogue", "summarisation"], limit=N)
    assert found.equals(scores.set_index("task").loc[["dialogue", "summarisation"]].reset_index()[COLUMNS])
    assert os.getcwd() == os.path.realpath(tmp_path)


def test_the_tasks_are_where_the_data_are():
    assert TASKS == paths.DATA / "tasks"
