"""What a set like HardEdit is made of: common words as subjects, and relations whose templates open with the subject.

    given = materials("miniworld-gpt2")              # of an embedded model: its own world's
    given = materials("gpt2-xl", words="words.txt", requests="counterfact.json")

*The Butterfly Effect of Model Editing* had such requests written by GPT-3.5 after the pattern of those that collapse
models: the subject is a single common word, and the first of the prompt. Here they are put together from lists
(studies/hardedit.py). Needs no torch.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbkit.errors import RequestError, ResultsError
from nbkit.records import embedded
from nbkit.records.bounds import check_text, check_texts, shown
from nbkit.records.files import write_atomically
from nbkit.records.requests import EditRequest, read_requests, read_texts
from nbkit.records.text_files import read_lines, read_records

COMMON = 10  # times that a word stands in the texts of a world, at least
WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Relation:
    """Templates that open with `{}`, and two or more targets that each can end with. RequestError for others."""

    relation_id: str
    templates: tuple[str, ...]
    targets: tuple[str, ...]

    def __post_init__(self):
        check_text("relation_id", self.relation_id, RequestError)
        for field in ("templates", "targets"):
            check_texts(f"relation {self.relation_id!r}: {field}", getattr(self, field), RequestError)
            object.__setattr__(self, field, tuple(dict.fromkeys(getattr(self, field))))
        if not self.templates or len(self.targets) < 2:
            raise RequestError(
                f"relation {self.relation_id!r} has {len(self.templates)} templates and {len(self.targets)} targets; "
                "it needs a template, and two different targets"
            )
        for template in self.templates:
            if not template.startswith("{} ") or template.count("{}") != 1:
                raise RequestError(
                    f"relation {self.relation_id!r}: the template {template!r} must open with {{}}, which stands for "
                    "the subject, and a space, and have no other {}"
                )


@dataclass(frozen=True)
class Materials:
    """words: what may become a subject. taken: subjects of other requests, which may not. sources: what was read."""

    words: tuple[str, ...]
    relations: tuple[Relation, ...]
    taken: frozenset[str]
    sources: Mapping[str, str]


def materials(
    model: str,
    words: str | Path | None = None,
    relations: str | Path | None = None,
    requests: str | Path | None = None,
) -> Materials:
    """The lists that a set is made of, from files, or of an embedded model from its world.

    Args:
        model: a model's name; only whether it is an embedded one is looked at.
        words: a file with a word a line.
        relations: a JSON file of records with relation_id, templates and targets; without one they are those of the
            requests.
        requests: a file or name as of `read_requests`: the set shares no subject with them.

    RequestError, saying which file is needed, for a model without a world.
    """
    world = embedded.WORLDS.get(embedded.MODELS.get(str(model), ""))
    name = embedded.MODELS.get(str(model), "")
    if world is None and (words is None or (relations is None and requests is None)):
        raise RequestError(
            f"{shown(str(model))} is no embedded model and has no words and relations of its own: give a file of words "
            "(--words), and one of relations or of requests (--relations, --requests)"
        )
    source = requests if requests is not None else f"{name}-facts" if world else None
    known = [] if source is None else read_requests(source)
    chosen = relations_of(known) if relations is None else read_relations(relations)
    text = f"{name}-training-lines"
    listed = common_words(read_texts(text), known) if words is None else read_lines(Path(words).expanduser())
    sources = {
        "words": f"words that stand {COMMON} times or more in {text} and in no subject or target"
        if words is None
        else Path(words).name,
        "relations": Path(relations if relations is not None else source).name,
        "requests": "none" if source is None else Path(source).name,
    }
    return Materials(tuple(listed), tuple(chosen), frozenset(one.subject for one in known), sources)


def read_relations(path: str | Path) -> list[Relation]:
    """Relations of a JSON file; RequestError naming file and record for one that is none, and for a file without."""
    path, found = Path(path).expanduser(), []
    for index, record in enumerate(read_records(path)):
        where = f"{path.name}, record {index}"
        if not isinstance(record, dict):
            raise RequestError(f"{where}: expected an object with named fields, not {shown(record)}")
        try:
            found.append(Relation(record["relation_id"], record["templates"], record["targets"]))
        except KeyError as missing:
            raise RequestError(f"{where}: the field {missing} is missing") from missing
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
    if not found:
        raise RequestError(f"{path} holds no relation")
    return found


def relations_of(requests: Sequence[EditRequest]) -> list[Relation]:
    """The relations of requests: those of their templates that open with the subject, and all their targets.

    A relation without such a template, or with one target, is left out, and so are requests of no relation.
    RequestError if none is left.
    """
    templates: dict[str, dict[str, None]] = {}
    targets: dict[str, dict[str, None]] = {}
    for request in requests:
        if request.relation_id is not None:
            opens = request.prompt.startswith("{} ")
            templates.setdefault(request.relation_id, {}).update(dict.fromkeys([request.prompt] if opens else []))
            said = [target.strip() for target in (request.target_new, request.target_true) if target]
            targets.setdefault(request.relation_id, {}).update(dict.fromkeys(said))
    usable = [name for name in templates if templates[name] and len(targets[name]) > 1]
    if not usable:
        named = "" if templates else ", since none of them has a relation_id"
        raise RequestError(
            f"these {len(requests)} requests give no relation with a prompt that opens with its subject and two targets"
            f"{named}; give a file of relations"
        )
    return [Relation(name, tuple(templates[name]), tuple(targets[name])) for name in sorted(usable)]


def common_words(texts: Iterable[str], requests: Iterable[EditRequest], at_least: int = COMMON) -> list[str]:
    """The words of texts, as they are written there, the most frequent first; none of a subject or target."""
    named = [text for one in requests for text in (one.subject, one.target_new, one.target_true) if text]
    names = {word for text in named for word in WORD.findall(text)}
    counts = Counter(word for text in texts for word in WORD.findall(text))
    return [word for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            if n >= at_least and word not in names]  # fmt: skip


CARD = """# {title}

{n} edit requests whose subject is one common word, one token for {model}, and the first of its prompt: the pattern of
the requests that collapse models (HardEdit, in *The Butterfly Effect of Model Editing*). They were put together from
lists by `python -m nbkit hardedit`, and nobody has read them: most say nothing about the world.

| | |
|---|---|
| model | {model}, {hash} |
| words | {words} |
| relations | {relations} |
| requests that no subject is taken from | {requests} |
| n, seed | {n}, {seed} |
| different subjects, relations, prompts | {counts} |

`target_true` is the target of the relation that the model finds likeliest at the prompt, `target_new` one drawn from
the others that it does not say there; paraphrases are the relation's other templates.

| dropped | how many |
|---|---|
{dropped}

Limits: what is one token, and what the model says, is this model's: for another one make another set. A word in front
of a template made for names is an unlikely text, so an edit of it says how the weights take a first token's key, and
little about facts. There are no neighbours, so locality cannot be asked.
"""


def write_card(path: Path, made: Sequence[EditRequest], dropped: Mapping[str, int], **about: Any) -> Path:
    """Writes the data card of a set and returns its path; ResultsError if it cannot.

    about: model, hash, seed and the sources of `materials`.
    """
    different = [{one.subject for one in made}, {one.relation_id for one in made}, {one.prompt for one in made}]
    rows = [f"| {reason} | {n} |" for reason, n in dropped.items()] or ["| nothing | |"]
    counts = ", ".join(str(len(one)) for one in different)
    text = CARD.format(title=path.stem, n=len(made), counts=counts, dropped="\n".join(rows), **about)
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise ResultsError(f"cannot write {path.name} to {path.parent}: {error.strerror or error}") from error
    return path
