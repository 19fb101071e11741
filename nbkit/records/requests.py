"""What is to be edited: `EditRequest`, and one reader for every file of requests the papers use.

    requests = read_requests("miniworld", limit=50, seed=0)
    requests = read_requests("counterfact.json")
    texts = read_texts("miniworld", limit=50)         # what perplexity is measured on

A file is a JSON list or JSON lines. The schema is recognised record by record:

| schema           | recognised by         | prompt                                        | target_true       |
|------------------|-----------------------|-----------------------------------------------|-------------------|
| CounterFact      | `requested_rewrite`   | a template                                    | `target_true.str` |
| eight fields     | `prompt`, `target_new`| filled in: the subject is cut out again       | `ground_truth`    |
| known_1000       | `known_id`            | filled in; there is no counterfactual, so     | none              |
|                  |                       | `target_new` is the known `attribute`         |                   |
| zsRE             | `src`, `alt`          | a question: the subject is cut out            | first of `answers`|

Nothing here imports torch: requests can be read where no model is.
"""

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from nbkit import paths
from nbkit.errors import RequestError
from nbkit.records import embedded
from nbkit.records.bounds import check_number, check_text, check_texts, nearest, shown
from nbkit.records.text_files import read_lines, read_records

LISTS = ("paraphrase_prompts", "neighborhood_prompts", "neighborhood_targets", "generation_prompts")


@dataclass(frozen=True)
class EditRequest:
    """One wish: after `prompt` about `subject`, the model shall say `target_new`.

    `prompt` holds exactly one `{}`, the subject's place. `neighborhood_targets` are the right answers of
    `neighborhood_prompts`, one each. `generation_prompts` open texts about the subject, for what a model says by
    itself. `case_id` is a text, or a whole number of at most 64 bits. Raises RequestError, naming `case_id` and the
    field, for a record that no method could use.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    case_id: int | str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    neighborhood_targets: tuple[str, ...] = ()
    relation_id: str | None = None
    generation_prompts: tuple[str, ...] = ()

    def __post_init__(self):
        if self.case_id is not None and not isinstance(self.case_id, str):
            object.__setattr__(self, "case_id", _whole_id(self.case_id, self.subject))
        for field in ("prompt", "subject", "target_new"):
            check_text(f"{self.label}: {field}", getattr(self, field), RequestError)
        for field in ("case_id", "target_true", "relation_id"):
            value = getattr(self, field)
            if value is not None and not (field == "case_id" and isinstance(value, int)):
                check_text(f"{self.label}: {field}", value, RequestError)
        if self.prompt.count("{}") != 1:
            raise RequestError(
                f"{self.label}: the prompt {self.prompt!r} has {self.prompt.count('{}')} places marked {{}}; "
                "it needs exactly one, where the subject goes"
            )
        if self.target_true is not None and self.target_new.strip() == self.target_true.strip():
            raise RequestError(f"{self.label}: target_new equals target_true ({self.target_new!r}); nothing to edit")
        for field in LISTS:
            check_texts(f"{self.label}: {field}", getattr(self, field), RequestError)
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.neighborhood_targets) != len(self.neighborhood_prompts):
            raise RequestError(
                f"{self.label}: {len(self.neighborhood_prompts)} neighborhood_prompts "
                f"but {len(self.neighborhood_targets)} neighborhood_targets; each prompt needs its right answer"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject in its place. Braces in the subject stay what they are."""
        return self.prompt.replace("{}", self.subject)

    @property
    def alone(self) -> "EditRequest":
        """The same wish, without the prompts that are asked besides its own: paraphrases, neighbours, generation."""
        return replace(
            self, paraphrase_prompts=(), neighborhood_prompts=(), neighborhood_targets=(), generation_prompts=()
        )

    @property
    def label(self) -> str:
        """How messages name this record."""
        name = f"request {self.case_id}" if self.case_id is not None else "request"
        return f"{name} (subject {shown(self.subject)})"


def read_requests(path_or_name: str | Path, limit: int | None = None, seed: int | None = None) -> list[EditRequest]:
    """Read a file of requests, or an embedded one by its name (`"miniworld"`).

    `limit`: at most so many; with a `seed`, a random sample in random order, else the first ones of the file.
    Raises RequestError naming file and record for one that is malformed, and for a file without any. A zsRE record
    whose question does not hold the subject is skipped with a warning; a guess would edit at the wrong token.
    """
    _check_limit(limit)
    if seed is not None:
        check_number("seed", seed, whole=True, error=RequestError, least=0)
    path = _locate(path_or_name, embedded.REQUESTS, "requests")
    requests = []
    for index, record in enumerate(read_records(path)):
        where = f"{path.name}, record {index}"
        if not isinstance(record, dict):
            raise RequestError(f"{where}: expected an object with named fields, found {type(record).__name__}")
        try:
            requests.append(_reader(record)(record))
        except _SubjectMissing as missing:
            if "src" not in record:
                raise RequestError(f"{where}: {missing}") from missing
            warnings.warn(f"{where} is skipped: {missing}", stacklevel=2)
        except KeyError as missing:
            raise RequestError(f"{where}: the field {missing} is missing") from missing
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
    if not requests:
        raise RequestError(f"{path} holds no request that can be used")
    if seed is not None:
        requests = random.Random(int(seed)).sample(requests, len(requests))
    return requests[:limit]


def read_texts(path_or_name: str | Path, limit: int | None = None) -> list[str]:
    """The first `limit` texts of a file, or of an embedded one by its name, in order.

    "miniworld": held-out texts, for perplexity; "miniworld-training": training text, for second moments;
    "miniworld-training-lines": the same line by line. The second has its lines joined to documents that fill the
    context many times: a first token's key is unlike all others, and every text has one, so lines of some twenty tokens
    would make second moments of keys that long texts hardly have.

    A file is a JSON list or JSON lines of records with a field `Text`, the schema of ME-PPL, or ends in .txt and holds
    one text a line, blank lines aside. Raises RequestError naming file and record for one that holds no text, and for a
    file without any.
    """
    _check_limit(limit)
    path = _locate(path_or_name, embedded.TEXTS, "texts")
    if path.suffix == ".txt":
        lines = read_lines(path)
        if not lines:
            raise RequestError(f"{path} holds no text")
        n = embedded.DOCUMENTS.get(str(path_or_name), 1)
        return ["\n".join(lines[start : start + n]) for start in range(0, len(lines), n)][:limit]
    records = read_records(path)[:limit]
    if not records:
        raise RequestError(f"{path} holds no text")
    for index, record in enumerate(records):
        where = f"{path.name}, record {index}"
        if not isinstance(record, dict) or "Text" not in record:
            raise RequestError(f"{where}: expected an object whose field Text holds a text, not {shown(record)}")
        check_text(f"{where}: the field Text", record["Text"], RequestError)
    return [record["Text"] for record in records]


def _check_limit(limit: int | None) -> None:
    """A negative one would take all but the last, 0 nothing that could be edited or measured."""
    if limit is not None:
        check_number("limit", limit, whole=True, error=RequestError, least=1)


def _whole_id(case_id: Any, subject: Any) -> int | None:
    """A whole number as Python's own, one of NumPy too; of the 64 bits that a table's column can hold."""
    if isinstance(case_id, Integral) and not isinstance(case_id, bool) and -(2**63) <= case_id < 2**63:
        return int(case_id)
    raise RequestError(
        f"request (subject {shown(subject)}): case_id must be a text or a whole number of at most 64 bits, not "
        f"{shown(case_id)}"
    )


class _SubjectMissing(RequestError):
    """The filled-in prompt does not hold its subject."""


def _locate(path_or_name: str | Path, known: dict[str, str], what: str) -> Path:
    if not isinstance(path_or_name, str | Path):
        raise RequestError(f"a file of {what} is given by its path or name, not by {shown(path_or_name)}")
    name = str(path_or_name)
    try:
        path = paths.DATA / known[name] if name in known else Path(name).expanduser()
        here = path.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, or the home of a user whom nobody knows
        raise RequestError(f"no file of {what} is at {shown(name)}: {error}") from error
    if not here:
        meant = nearest(name, list(known))
        raise RequestError(f"no file of {what} at {path}; embedded ones: {', '.join(known)}{meant}")
    return path


def _reader(record: dict) -> Callable[[dict], EditRequest]:
    if "requested_rewrite" in record:
        return _from_counterfact
    if "src" in record and "alt" in record:
        return _from_zsre
    if "known_id" in record:
        return _from_known
    return _from_eight_fields


def _from_counterfact(record: dict) -> EditRequest:
    rewrite = _object(record, "requested_rewrite")
    new, true = (_object(rewrite, field) for field in ("target_new", "target_true"))
    neighbors = record.get("neighborhood_prompts", ())
    return EditRequest(
        prompt=rewrite["prompt"],
        subject=rewrite["subject"],
        target_new=new["str"],
        target_true=_text(true, "str"),
        case_id=record.get("case_id"),
        paraphrase_prompts=record.get("paraphrase_prompts", ()),
        neighborhood_prompts=neighbors,
        # CounterFact's neighbours share the true object
        neighborhood_targets=(true["str"],) * (len(neighbors) if isinstance(neighbors, list) else 0),
        relation_id=rewrite.get("relation_id"),
        generation_prompts=record.get("generation_prompts", ()),
    )


def _from_eight_fields(record: dict) -> EditRequest:
    prompt, subject = _text(record, "prompt"), record["subject"]
    return EditRequest(
        prompt=prompt if "{}" in prompt else cut_out(prompt, subject),
        subject=subject,
        target_new=record["target_new"],
        target_true=record.get("ground_truth", record.get("target_true")),
        case_id=record.get("case_id"),
        paraphrase_prompts=_one_or_more(record, "rephrase_prompt", "paraphrase_prompts"),
        neighborhood_prompts=_one_or_more(record, "locality_prompt", "neighborhood_prompts"),
        neighborhood_targets=_one_or_more(record, "locality_ground_truth", "neighborhood_targets"),
        relation_id=record.get("relation_id"),
        generation_prompts=_one_or_more(record, None, "generation_prompts"),
    )


def _from_known(record: dict) -> EditRequest:
    # `prompt` goes on to just before the attribute, `template` may stop earlier: the former asks for the attribute.
    return EditRequest(
        prompt=cut_out(_text(record, "prompt"), record["subject"]),
        subject=record["subject"],
        target_new=record["attribute"],
        case_id=record["known_id"],
        relation_id=record.get("relation_id"),
    )


def _from_zsre(record: dict) -> EditRequest:
    check_texts("answers", record.get("answers", []), RequestError)
    answers = record.get("answers") or [record["pred"]]
    return EditRequest(
        prompt=cut_out(_text(record, "src"), record["subject"]),
        subject=record["subject"],
        target_new=record["alt"],
        target_true=answers[0],
        case_id=record.get("case_id"),
        paraphrase_prompts=_one_or_more(record, "rephrase"),
        neighborhood_prompts=_one_or_more(record, "loc"),
        neighborhood_targets=_one_or_more(record, "loc_ans"),
    )


def cut_out(text: str, subject: str) -> str:
    """Turn a filled-in prompt back into a template.

    The subject's last occurrence as whole words becomes `{}` ("Al" in "Also Al" is the second one), the last because
    there the model has read most of the prompt. A part of a word is taken only where it never stands as whole words.
    """
    check_text(f"the subject of {text!r}", subject, RequestError)
    pattern = re.escape(subject)
    places = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", text)) or list(re.finditer(pattern, text))
    if not places:
        raise _SubjectMissing(f"the subject {subject!r} does not occur in {text!r}")
    start, end = places[-1].span()
    return text[:start] + "{}" + text[end:]


def _object(record: dict, field: str) -> dict:
    if not isinstance(record[field], dict):
        raise RequestError(f"{field} must be an object with named fields, not {shown(record[field])}")
    return record[field]


def _text(record: dict, field: str) -> str:
    check_text(field, record[field], RequestError)
    return record[field]


def _one_or_more(record: dict, one: str | None, several: str | None = None) -> Any:
    """The texts of the field `one`, which may be a text by itself, or else those of `several`, which is a list."""
    value = record.get(one)
    if value is None:
        return () if record.get(several) is None else record[several]
    return (value,) if isinstance(value, str) else value
