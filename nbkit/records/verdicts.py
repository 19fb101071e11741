"""Claims of the papers held to what was measured here: one row a claim, and whether it holds, model by model.

    verdict = Verdict("A single edit by ROME can collapse a model", "A, fig. 1a", "77 of 21,919 requests (recalled)",
                      rule="some edit raises perplexity tenfold")
    verdict.of("miniworld-gpt2", "27 of 120 [16, 31 %]", holds=True)
    plots.save_verdicts([verdict], "01_verdicts", caption)

The rule is written down beside the claim, and a notebook computes `holds` from its rows by that rule: no verdict is
typed in. What was not measured has none, and what an interval leaves open (`below`, `unless`, `all_of`: None) neither.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nbkit.records.bounds import check_choice, check_text
from nbkit.records.files import write_atomically
from nbkit.records.text_files import read_text

HOLDS, PARTLY, NOT = "holds", "partly", "does not hold"
UNDECIDED = "undecided"
COLUMNS = ["claim", "published", "holds where", "measured here", "verdict"]


@dataclass
class Verdict:
    """One claim, what its paper gives for it, the rule by which it holds, and what each model says.

    published: the paper's value; say "(recalled)" where it is from memory, not read in the paper.
    """

    claim: str
    source: str  # paper and place: "A, fig. 1a"
    published: str
    rule: str
    measured: dict[str, tuple[str, str]] = field(default_factory=dict)  # model -> what was measured, its verdict

    def of(self, model: str, measured: str, holds: bool | str | None) -> "Verdict":
        """Puts down what was measured on one model, with its interval, and whether the claim holds there by the rule.

        holds: True, False, "partly", or None where it could not be measured, or where what was measured leaves it open.
        Returns the verdict itself.
        """
        words = {True: HOLDS, False: NOT, None: UNDECIDED}
        if not isinstance(holds, str):
            holds = words[None if holds is None else bool(holds)]
        check_choice("holds", holds, (HOLDS, PARTLY, NOT, UNDECIDED))
        check_text("model", model)
        check_text("measured", measured)
        self.measured[model] = (measured, holds)
        return self

    @property
    def outcome(self) -> str:
        """"holds" or "does not hold" where all models that decide it agree, "partly" where they do not."""
        said = {holds for _, holds in self.measured.values()} - {UNDECIDED}
        return UNDECIDED if not said else said.pop() if len(said) == 1 else PARTLY

    def row(self) -> dict[str, str]:
        """The claim as a row of the table."""
        single = len(self.measured) == 1
        each = [f"{model}: {value}" + ("" if single else f" ({holds})")
                for model, (value, holds) in self.measured.items()]  # fmt: skip
        values = (f"{self.claim} ({self.source})", self.published, self.rule, "; ".join(each), self.outcome)
        return dict(zip(COLUMNS, values, strict=True))


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row a claim, as notebooks show it."""
    return pd.DataFrame([verdict.row() for verdict in verdicts], columns=COLUMNS)


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """The same as a table of Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *table(verdicts).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows) + "\n"


def collect(folder: Path) -> Path | None:
    """Writes the tables in that folder, NAME_verdicts.md each, into its verdicts.md; None, and no file, without any."""
    text, path = collected(folder), folder / "verdicts.md"
    if text is None:
        return None
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def collected(folder: Path) -> str | None:
    """The tables of verdicts in that folder as one text with a heading for each; None if there are none."""
    tables = sorted(folder.glob("*_verdicts.md"))
    if not tables:
        return None
    parts = [
        "# What the papers claim, and what was measured here\n",
        "A: *The Butterfly Effect of Model Editing*; B: *The Fall of ROME*; C: *Model Editing Harms General "
        "Abilities*. Each table is written by the notebook that it is named after, which computes every verdict from "
        "its rows by the rule that stands beside the claim. Published values marked “recalled” are from memory.\n",
    ]
    parts.append(f"## In short\n\n{in_short(tables)}")
    for path in tables:
        parts.append(f"## {path.name.removesuffix('_verdicts.md')}\n\n{read_text(path).strip()}\n")
    return "\n".join(parts)


def in_short(tables: Sequence[Path]) -> str:
    """Claim, verdict and notebook of every row in files of tables, as one table of Markdown."""
    rows = []
    for path in tables:
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in read_text(path).splitlines() if line.startswith("| ")]
        name = f"`{path.name.removesuffix('_verdicts.md')}`"
        rows += [(row[0].strip(), row[-1].strip(), name) for row in cells[2:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [("claim", "verdict", "notebook"), ("---",) * 3, *rows]) + "\n"


def _cell(value: str) -> str:
    return re.sub(r"\s+", " ", value).replace("|", "\\|")


def below(low: float, high: float, bound: float) -> bool | None:
    """Whether an interval lies below a bound (True) or above it (False); None where it holds it, or is NaN."""
    return True if high < bound else False if low > bound else None


def unless(decided: bool | None) -> bool | None:
    """The opposite; what is open stays open."""
    return None if decided is None else not decided


def all_of(*parts: bool | None) -> bool | None:
    """Whether all hold: False as soon as one does not, None while one is open."""
    return False if False in parts else None if None in parts else True
