"""Writes miniworld as data files in the schemas that the rest of nbkit reads.

    data/miniworld/facts.json            every fact as a CounterFact record without neighbours
    data/miniworld/requests.json         edit requests: whole CounterFact records, a third of each kind of subject
    data/miniworld/questions.json        the same edits asked as questions: zsRE records
    data/miniworld/perplexity.json       held-out text for perplexity, in ME-PPL's schema
    data/miniworld/text.txt              training text, one line a line, for second moments
    data/tasks/KIND/{train,held_out}.jsonl   task items; data/tasks/*.yaml, written by hand, are their lm-eval tasks
"""

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from random import Random

from miniworld.corpus import lines
from miniworld.task_items import KINDS, Item, items
from miniworld.text import Writer, question
from miniworld.world import RELATIONS, Fact, World

N_REQUESTS = 900
N_TEXTS = 500
N_TEXT_LINES = 12_000
N_ITEMS = 200  # of each kind of task, for training and held out


def held_out_items(world: World) -> dict[str, list[Item]]:
    return {kind: items(kind, world, Random(f"held out {kind}"), N_ITEMS, True, set()) for kind in KINDS}


def held_out_texts(world: World) -> list[dict[str, str]]:
    """Perplexity texts: three stories to two lines of facts, as {Corpus, Text}."""
    writer = Writer(world, Random("held out texts"))
    makers = {"story": writer.story_line, "facts": writer.fact_line}
    kinds = ["story", "facts", "story", "facts", "story"] * (N_TEXTS // 5)
    return [{"Corpus": f"miniworld {kind}", "Text": makers[kind]()} for kind in kinds]


def held_out(world: World) -> frozenset[str]:
    """Every prompt and text that the training text must not contain."""
    prompts = {item["prompt"] for asked in held_out_items(world).values() for item in asked}
    return frozenset(prompts | {record["Text"] for record in held_out_texts(world)})


def record(world: World, fact: Fact, case_id: int, template: int, target_new: str) -> dict[str, object]:
    """A fact as a CounterFact record without neighbours, stated by one template, the other three as paraphrases."""
    others = [number for number in range(4) if number != template]
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": fact.relation.templates[template],
            "relation_id": fact.relation.relation_id,
            "target_new": {"str": target_new},
            "target_true": {"str": fact.object},
            "subject": fact.subject,
        },
        "paraphrase_prompts": [fact.relation.templates[number].replace("{}", fact.subject) for number in others],
        "neighborhood_prompts": [],
        "attribute_prompts": [],
        "generation_prompts": [],
    }


def facts(world: World) -> list[dict[str, object]]:
    """One record a fact: a template and a counterfactual target of the same relation drawn for each."""
    rng = Random("facts")
    objects = defaultdict(list)
    for fact in world.facts:
        if fact.object not in objects[fact.relation]:
            objects[fact.relation].append(fact.object)
    return [
        record(
            world,
            fact,
            case_id,
            rng.randrange(4),
            rng.choice([other for other in objects[fact.relation] if other != fact.object]),
        )
        for case_id, fact in enumerate(world.facts)
    ]


def requests(world: World) -> list[dict[str, object]]:
    """Edit requests: a third open with a one-token subject, a third with one of several tokens, a third name it later.

    Neighbours share relation and object; attribute prompts are about subjects that truly have the new target.
    As in CounterFact, the second paraphrase comes after an unrelated sentence, and some targets are of several tokens:
    of the relations that state every fact with one article, every other request asks for the article too.
    """
    rng, writer = Random("requests"), Writer(world, Random("request sentences"))
    articles = {relation.relation_id: relation.article for relation in RELATIONS}
    longer = dict.fromkeys(articles, False)
    single = set(world.single_token_names)
    with_object = defaultdict(list)
    for fact in world.facts:
        with_object[fact.relation.relation_id, fact.object].append(fact)
    groups: dict[str, list[dict[str, object]]] = defaultdict(list)
    for known in facts(world):
        rewrite = known["requested_rewrite"]
        if len(with_object[rewrite["relation_id"], rewrite["target_true"]["str"]]) < 2:
            continue  # without a neighbour there is nothing to measure locality on
        opens = rewrite["prompt"].startswith("{}")
        group = "later" if not opens else "one token" if rewrite["subject"] in single else "several tokens"
        groups[group].append(known)
    chosen = [known for group in sorted(groups) for known in rng.sample(groups[group], N_REQUESTS // 3)]
    rng.shuffle(chosen)
    for known in chosen:
        rewrite = known["requested_rewrite"]
        subject, relation_id = rewrite["subject"], rewrite["relation_id"]
        alike = [fact for fact in with_object[relation_id, rewrite["target_true"]["str"]] if fact.subject != subject]
        other = with_object[relation_id, rewrite["target_new"]["str"]]
        known["neighborhood_prompts"] = prompts_about(alike, rng)
        known["attribute_prompts"] = prompts_about(other, rng)
        first, second, third = known["paraphrase_prompts"]
        known["paraphrase_prompts"] = [first, f"{writer.filler()} {rng.choice([second, third])}"]
        related = [fact for fact in world.facts_about()[subject] if fact.relation.relation_id != relation_id]
        known["generation_prompts"] = prompts_about(related, rng)
        if article := articles[relation_id]:
            longer[relation_id] = not longer[relation_id]
            if longer[relation_id]:
                ask_for_article(known, article)
    return chosen


def questions(world: World) -> list[dict[str, object]]:
    """The edit requests as zsRE records, by the same case_ids: asked as the training text asks, `text.question`.

    No prompt opens with its subject. The rephrase states the fact, by a template that names the subject later; loc is
    the question about a fact that shares neither subject nor relation nor object. Targets are those of the requests
    without the article that some ask for: a question is answered by the object alone.
    """
    rng, about = Random("questions"), world.facts_about()
    asked = []
    for known in requests(world):
        rewrite = known["requested_rewrite"]
        (fact,) = [one for one in about[rewrite["subject"]] if one.relation.relation_id == rewrite["relation_id"]]
        new, article = rewrite["target_new"]["str"], fact.relation.article
        elsewhere = rng.choice(world.facts)
        while {elsewhere.subject, elsewhere.relation, elsewhere.object} & {fact.subject, fact.relation, fact.object}:
            elsewhere = rng.choice(world.facts)
        asked.append({
            "case_id": known["case_id"],
            "subject": fact.subject,
            "src": question(fact),
            "rephrase": rng.choice(fact.relation.templates[2:]).replace("{}", fact.subject),
            "alt": new if article is None else new.removeprefix(f"{article} "),
            "answers": [fact.object],
            "loc": question(elsewhere),
            "loc_ans": elsewhere.object,
        })  # fmt: skip
    return asked


def ask_for_article(record: dict[str, object], article: str) -> None:
    """Move the article that every prompt of a record's relation ends with to the targets, in place."""
    rewrite = record["requested_rewrite"]
    rewrite["prompt"] = rewrite["prompt"].removesuffix(f" {article}")
    for target in ("target_new", "target_true"):
        rewrite[target] = {"str": f"{article} {rewrite[target]['str']}"}
    for name in ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts"):
        record[name] = [prompt.removesuffix(f" {article}") for prompt in record[name]]


def prompts_about(some: list[Fact], rng: Random, most: int = 5) -> list[str]:
    return [
        fact.relation.templates[rng.randrange(4)].replace("{}", fact.subject)
        for fact in rng.sample(some, min(most, len(some)))
    ]


def write_files(world: World, data: Path) -> None:
    """Write every data file of the world below `data`; the same world gives the same bytes."""
    folder = data / "miniworld"
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (
        ("facts", facts(world)),
        ("requests", requests(world)),
        ("questions", questions(world)),
        ("perplexity", held_out_texts(world)),
    ):
        body = ",\n".join(json.dumps(item, ensure_ascii=False) for item in records)
        (folder / f"{name}.json").write_text(f"[\n{body}\n]\n", encoding="utf-8")
    forbidden, asked = held_out(world), held_out_items(world)
    text = "\n".join(islice(lines(world, 999, forbidden), N_TEXT_LINES))
    (folder / "text.txt").write_text(text + "\n", encoding="utf-8")
    for kind in KINDS:
        taken = {item["prompt"] for item in asked[kind]}
        splits = {"train": items(kind, world, Random(f"train {kind}"), N_ITEMS, False, taken), "held_out": asked[kind]}
        (data / "tasks" / kind).mkdir(parents=True, exist_ok=True)
        for split, written in splits.items():
            body = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in written)
            (data / "tasks" / kind / f"{split}.jsonl").write_text(body, encoding="utf-8")
