"""The eight tasks of *Model Editing Harms General Abilities*: their prompts, records and scorers, by hand."""

import json
import math
from pathlib import Path

import datasets
import pytest

from nbkit.studies import scorers
from nbkit.studies.task_scores import TASKS, _lm_eval, _own, task_files, task_names

RTE = {"sentence1": "Oil fell.", "sentence2": "Oil rose.", "label": 1, "idx": 0}
SST2 = {"sentence": "a dull film ", "label": 0, "idx": 0}
BOOLQ = {"question": "is ice cold", "answer": True, "passage": "Ice is frozen water."}
MUTUAL = {"answers": "A", "options": ["m : yes .", "m : no .", "m : tea .", "m : ten ."], "id": "dev_1",
          "article": "f : is it six ?"}  # fmt: skip
SAMSUM = {"id": "1", "dialogue": "Ann: tea?\r\nBob: yes", "summary": "Ann and Bob will have tea."}
CONLL = {"id": "0", "tokens": ["Rabin", "met", "U.N.", "staff", ",", "in", "Tel", "Aviv"], "pos_tags": [0] * 8,
         "chunk_tags": [0] * 8, "ner_tags": [1, 0, 3, 0, 0, 0, 5, 6]}  # fmt: skip
GSM8K = {"question": "Ann has 6 eggs and buys 7. How many?", "answer": "She has 6+7=<<6+7=13>>13.\n#### 13"}
NQ = {"question": "who won?", "answer": ["The Reds", "Reds F.C."], "output": ["\n\nIn 1999 the Reds won.", "second"]}

# name -> where its data are, their part, the new tokens, a record, and the prompt of its first item
PAPER = {
    "rect_gsm8k": (
        ("openai/gsm8k", "main"), "test", 5, GSM8K, "Q: Ann has 6 eggs and buys 7. How many? A:Let's think step by "
        "step. Therefore, the answer (arabic numerals) is:",
    ),
    "rect_gsm8k_rationale": (
        ("openai/gsm8k", "main"), "test", 5, GSM8K, "Q: Ann has 6 eggs and buys 7. How many? A:Let's think step by "
        "step. She has 6+7=<<6+7=13>>13.\n Therefore, the answer (arabic numerals) is:",
    ),
    "rect_rte": (
        ("nyu-mll/glue", "rte"), "train", 1, RTE, "Oil fell. entails the Oil rose.. True or False? answer:",
    ),
    "rect_nq": (
        ("json", None), "test", 20, NQ, "Refer to the passage below and answer the following question. Passage: \n\nIn "
        "1999 the Reds won. Question: who won?",
    ),
    "rect_boolq": (
        ("google/boolq", None), "validation", 1, BOOLQ, "Please answer the given question based on the passage. The "
        "answer should be exact 'yes' or 'no'. passage: Ice is frozen water. question: is ice cold. answer:",
    ),
    "rect_mutual": (
        ("lighteval/mutual_harness", "mutual"), "validation", 1, MUTUAL, "Q: f : is it six ? Which choice is correct? "
        "Answer Chioces: (A)m : yes .(B)m : no .(C)m : tea .(D)m : ten . A: Among A through D, the answer is",
    ),
    "rect_samsum": (("knkarthick/samsum", None), "validation", 25, SAMSUM, "Ann: tea?\r\nBob: yes\nTL;DR:"),
    "rect_conll2003": (
        ("lhoestq/conll2003", None), "test", 10, CONLL, "Please identify Person Entity from the given text. Text: "
        "Rabin met U.N. staff, in Tel Aviv Entity:",
    ),
    "rect_sst2": (
        ("nyu-mll/glue", "sst2"), "validation", 1, SST2, "For each snippet of text,label the sentiment of the text as "
        "positive or negative.The answer should be exact 'positive' or 'negative'. text: a dull film  answer:",
    ),
}  # fmt: skip


def loaded(name: str, records: list[dict], monkeypatch):
    """The task as lm-eval makes it of its file, with these records for its data, and what it asks the hub for."""
    asked = []

    def load_dataset(path, name=None, **more):
        asked.append((path, name, more))
        return {part: datasets.Dataset.from_list(records)}

    part = PAPER[name][1]
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", load_dataset)
        task = _own(str(TASKS / "rect")).load([name])["tasks"][name]
    return task, asked


def scored(name: str, records: list[dict], text: str, monkeypatch, item: int = 0) -> dict:
    task, _ = loaded(name, records, monkeypatch)
    return task.process_results(task.eval_docs[item], [text])


def test_there_are_eight_kinds_and_no_name_is_taken():
    assert set(task_names(TASKS / "rect")) == set(PAPER) and task_names(TASKS / "generated")
    files = sorted(TASKS.glob("**/*.yaml"))
    assert sorted(task_files().values()) == files, "no two of one name"
    assert not ({path.stem for path in files} - set(task_names())) & set(_lm_eval().all_tasks)
    for name in PAPER:
        text = task_files()[name].read_text(encoding="utf-8")
        assert f"\ntask: {name}\n" in f"\n{text}" and "trust_remote_code" not in text


@pytest.mark.parametrize("name", PAPER)
def test_prompt_data_and_length_are_those_of_the_protocol(name, monkeypatch):
    where, _, n_tokens, record, prompt = PAPER[name]
    task, asked = loaded(name, [record], monkeypatch)
    ((path, config, more),) = asked
    assert (path, config) == where
    assert set(more) == ({"data_files"} if path == "json" else set())
    assert task.fewshot_context(task.eval_docs[0], 0) == prompt
    assert task.config.generation_kwargs == {"until": [], "max_gen_toks": n_tokens, "do_sample": False}
    assert list(task.aggregation()) == ["corrected", "as_released"] and set(task.higher_is_better().values()) == {True}


def test_the_passages_come_from_one_state_of_the_released_repository(monkeypatch):
    _, ((_, _, more),) = loaded("rect_nq", [NQ], monkeypatch)
    assert "/JasonForJoy/Model-Editing-Hurt/a9e9f3d334c93e926d91e4a1e17fd1f681319e4a/" in more["data_files"]["test"]


BOTH, NEITHER = {"as_released": 1, "corrected": 1}, {"as_released": 0, "corrected": 0}
ONLY_RELEASED, LEFT_OUT = {"as_released": 1, "corrected": 0}, {"corrected": 0}


@pytest.mark.parametrize(
    ("name", "record", "text", "expected"),
    [
        ("rect_gsm8k", GSM8K, " 13.", BOTH),
        ("rect_gsm8k", GSM8K, " $13.00", BOTH),
        ("rect_gsm8k", GSM8K, " 7.", NEITHER),
        ("rect_gsm8k", GSM8K, " 113 eggs", ONLY_RELEASED),  # part of another number
        ("rect_gsm8k", GSM8K, " 6 + 7 = 13", ONLY_RELEASED),
        ("rect_gsm8k", GSM8K, "", NEITHER),
        ("rect_gsm8k", {**GSM8K, "answer": "#### 1,300"}, " 1300", {"as_released": 0, "corrected": 1}),
        ("rect_gsm8k_rationale", GSM8K, " 13.", BOTH),
        ("rect_rte", RTE, " False", BOTH),
        ("rect_rte", RTE, " true", NEITHER),
        ("rect_rte", RTE, " The", LEFT_OUT),
        ("rect_rte", {**RTE, "label": 0}, "True", BOTH),
        ("rect_rte", {**RTE, "label": 0}, "untrue", ONLY_RELEASED),
        ("rect_sst2", SST2, " negative", BOTH),
        ("rect_sst2", SST2, " Positive", NEITHER),
        ("rect_sst2", SST2, "\n", LEFT_OUT),
        ("rect_boolq", BOOLQ, " yes", BOTH),
        ("rect_boolq", BOOLQ, "Yes", BOTH),
        ("rect_boolq", BOOLQ, " no", NEITHER),
        ("rect_boolq", {**BOOLQ, "answer": False}, " no", BOTH),
        ("rect_boolq", BOOLQ, " maybe", LEFT_OUT),
        ("rect_boolq", BOOLQ, " yes,", {"corrected": 1}),  # as released it is not exactly yes
        ("rect_mutual", MUTUAL, " A", BOTH),
        ("rect_mutual", MUTUAL, "(A)", BOTH),
        ("rect_mutual", MUTUAL, " B", NEITHER),
        ("rect_mutual", MUTUAL, " Ann", ONLY_RELEASED),
        ("rect_mutual", MUTUAL, "?", NEITHER),  # counts as wrong in the released accuracy too
        ("rect_nq", NQ, " Reds!", BOTH),
        ("rect_nq", NQ, "", ONLY_RELEASED),  # the passage has it
        ("rect_nq", NQ, " the Blues", ONLY_RELEASED),
        ("rect_nq", {**NQ, "output": ["They won."]}, " It was Reds FC, again", BOTH),
        ("rect_nq", {**NQ, "output": ["The Redsters won."]}, " They", NEITHER),  # whole words only
        ("rect_nq", {**NQ, "answer": ["question"]}, "", ONLY_RELEASED),  # even the instruction counts
    ],
)
def test_both_scorers_of_one_text(name, record, text, expected, monkeypatch):
    assert scored(name, [record], text, monkeypatch) == expected


def test_a_summary_loses_its_last_13_characters_as_released(monkeypatch):
    gold = SAMSUM["summary"]
    whole = scored("rect_samsum", [SAMSUM], gold, monkeypatch)
    assert whole["corrected"] == pytest.approx(1)
    # "Ann and Bob w" is left: 3 of 4 words and 3 of 6, 2 of 3 pairs and 2 of 5
    f1, f2 = 2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6), 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5)
    assert whole["as_released"] == pytest.approx((f1 + f2 + f1) / 3)
    assert scored("rect_samsum", [SAMSUM], gold + "<|endoftext|>", monkeypatch)["as_released"] == pytest.approx(1)
    assert scored("rect_samsum", [SAMSUM], f"\n {gold}\nTL;DR: more", monkeypatch)["corrected"] == pytest.approx(1)
    short = scored("rect_samsum", [SAMSUM], "Ann and Bob", monkeypatch)
    assert short["as_released"] == 0 < short["corrected"]
    assert scored("rect_samsum", [SAMSUM], "", monkeypatch) == {"as_released": 0, "corrected": 0}


def test_a_sentence_is_asked_for_each_type_of_entity(monkeypatch):
    task, _ = loaded("rect_conll2003", [CONLL], monkeypatch)
    found = {item["type"]: (item["entities"], item["released_entities"]) for item in task.eval_docs}
    assert found == {
        "Person": (["Rabin"], ["Rabin"]),
        "Location": (["Tel Aviv"], ["Tel"]),  # the last word of the sentence is lost
        "Organization": (["U.N."], ["U.N."]),
        "Miscellaneous": ([], []),
    }


def test_entities_that_touch_are_one_as_released_and_one_at_the_end_is_none(monkeypatch):
    record = {**CONLL, "tokens": ["Ann", "Bob", "of", "Rome"], "ner_tags": [1, 1, 0, 5]}
    items = loaded("rect_conll2003", [record], monkeypatch)[0].eval_docs
    assert (items[0]["entities"], items[0]["released_entities"]) == (["Ann", "Bob"], ["Ann Bob"])
    assert (items[1]["entities"], items[1]["released_entities"]) == (["Rome"], [""])


@pytest.mark.parametrize(
    ("item", "text", "as_released", "corrected"),
    [
        (0, " Rabin", ("Person", 1, 1), (1, 1, 1)),
        (0, " Rabin, Peres\nText: ...", ("Person", 1, 1), (1, 2, 1)),  # recall does not see what is wrong
        (0, " Mr Rabinovich", ("Person", 1, 1), (0, 1, 1)),  # part of another name
        (0, " Peres", ("Person", 0, 1), (0, 1, 1)),
        (1, " Tel", ("Location", 1, 1), (0, 1, 1)),
        (1, " Tel Aviv.", ("Location", 1, 1), (1, 1, 1)),
        (2, " U.N.", ("Organization", 1, 1), (1, 1, 1)),
        (2, "", ("Organization", 0, 1), (0, 0, 1)),
        (3, "", ("Miscellaneous", 1, 1), (0, 0, 0)),
        (3, " Rabin", ("Miscellaneous", 0, 1), (0, 1, 0)),
    ],
)
def test_counts_of_entities(item, text, as_released, corrected, monkeypatch):
    assert scored("rect_conll2003", [CONLL], text, monkeypatch, item) == {
        "as_released": as_released, "corrected": corrected
    }  # fmt: skip


def test_only_of_miscellaneous_an_entity_that_is_not_there_counts_as_released(monkeypatch):
    record = {**CONLL, "ner_tags": [0] * 8}
    counts = [scored("rect_conll2003", [record], " Rabin", monkeypatch, item)["as_released"] for item in range(4)]
    assert [total for _, _, total in counts] == [0, 0, 0, 1]


def test_recall_is_the_mean_over_types_and_f1_is_over_all():
    assert scorers.mean_recall([("a", 1, 2), ("a", 1, 1), ("b", 0, 4), ("c", 0, 0)]) == pytest.approx((2 / 3 + 0) / 2)
    assert scorers.micro_f1([(1, 2, 1), (0, 0, 2), (2, 2, 3)]) == pytest.approx(2 * 3 / (4 + 6))
    assert math.isnan(scorers.mean_recall([("c", 0, 0)])) and math.isnan(scorers.micro_f1([(0, 0, 0)]))
    everything = [("a", 1, 1)], [(1, 9, 1)]  # a text that names all there is: full recall, F1 of 0.2
    assert scorers.mean_recall(everything[0]) == 1 and scorers.micro_f1(everything[1]) == pytest.approx(0.2)


def records(shared: Path, name: str) -> list[dict]:
    lines = (shared / "data" / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_real_gsm8k(shared, monkeypatch):
    some = records(shared, "gsm8k")
    without, _ = loaded("rect_gsm8k", some, monkeypatch)
    with_it, _ = loaded("rect_gsm8k_rationale", some, monkeypatch)
    assert len(without.eval_docs) == len(some) == 200
    leaks = 0
    for record, item in zip(some, without.eval_docs, strict=True):
        rationale, gold = record["answer"].split("#### ")
        assert rationale in with_it.fewshot_context(item, 0) and rationale not in without.fewshot_context(item, 0)
        leaks += gold in with_it.fewshot_context(item, 0)[-len(rationale) - 60 :]
        assert without.process_results(item, [f" {gold}."]) == BOTH
        assert without.process_results(item, [f" 9{gold}"]) == ONLY_RELEASED
        assert without.process_results(item, [" I do not know"]) == NEITHER
    assert leaks >= 190, "the prompt as released tells the answer"


def test_real_boolq(shared, monkeypatch):
    some = records(shared, "boolq")
    for record in some:  # whose label is a text; the hub's is `answer`
        record["answer"] = record.pop("label") == "true"
    task, _ = loaded("rect_boolq", some, monkeypatch)
    share = sum(record["answer"] for record in some) / len(some)
    scores = [task.process_results(item, [" yes"])["corrected"] for item in task.eval_docs]
    assert sum(scores) / len(scores) == pytest.approx(share) and 0.5 < share < 0.75
    for record, item in zip(some, task.eval_docs, strict=True):
        prompt = task.fewshot_context(item, 0)
        assert record["passage"] in prompt and prompt.endswith(f" question: {record['question']}. answer:")
        assert task.process_results(item, [" The"]) == LEFT_OUT


def test_real_questions_of_nq(shared, monkeypatch):
    """Behind passages that tell the answer, as most of the released ones do, a model that says nothing is right."""
    some = [{**record, "output": [f"It is {record['answer'][0]}."]} for record in records(shared, "nq_open")]
    task, _ = loaded("rect_nq", some, monkeypatch)
    assert len(task.eval_docs) == 200
    for record, item in zip(some, task.eval_docs, strict=True):
        assert task.process_results(item, [""]) == ONLY_RELEASED
        assert all(task.process_results(item, [f" {answer}."]) == BOTH for answer in record["answer"])
