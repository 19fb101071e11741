"""Items of rect_nq and rect_conll2003, made of the records of their data sets as lm-eval's `process_docs`."""

from datasets import Dataset

TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")  # in the order of the hub's ids
TYPES = {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}


def with_passage(records: Dataset) -> Dataset:
    """With `prompt`, which the scorer reads too: the question after the first of the passages in `output`."""
    return records.map(lambda record: {"prompt": passage_prompt(record["output"][0], record["question"])})


def passage_prompt(passage: str, question: str) -> str:
    return f"Refer to the passage below and answer the following question. Passage: {passage} Question: {question}"


def of_each_type(records: Dataset) -> Dataset:
    """Four items a sentence: sentence, type, entities, and the entities as the released code reads them."""
    return Dataset.from_list([
        {"sentence": sentence(record["tokens"]), "type": name, "entities": entities(record["tokens"], tags, kind),
         "released_entities": released_entities(record["tokens"], tags, kind)}
        for record in records for tags in [[TAGS[tag] for tag in record["ner_tags"]]] for kind, name in TYPES.items()
    ])  # fmt: skip


def sentence(tokens: list[str]) -> str:
    """Tokens with spaces between them, but none before a comma or full stop."""
    return "".join(token if token in (",", ".") else f" {token}" for token in tokens)[1:]


def entities(tokens: list[str], tags: list[str], kind: str) -> list[str]:
    found: list[list[str]] = []
    for token, tag in zip(tokens, tags, strict=True):
        if tag == f"B-{kind}":
            found.append([token])
        elif tag == f"I-{kind}":
            found[-1].append(token)
    return [" ".join(words) for words in found]


def released_entities(tokens: list[str], tags: list[str], kind: str) -> list[str]:
    """An entity goes on to the next token that is in none, through others that follow at once.

    One that goes on to the end of the sentence loses its last token: of a single one nothing is left, which is part of
    any text.
    """
    found, place = [], 0
    while place < len(tags):
        if tags[place] == f"B-{kind}":
            end = next((later for later in range(place, len(tags)) if tags[later] == "O"), len(tags) - 1)
            found.append(" ".join(tokens[place:end]))
            place = end
        place += 1
    return found
