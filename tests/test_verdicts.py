"""Claims held to what was measured: the outcome over models, the table, and how the notebooks' tables are collected."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nbkit import plots
from nbkit.errors import MethodError
from nbkit.records import verdicts
from nbkit.records.verdicts import Verdict, all_of, below, unless


def claim(*holds) -> Verdict:
    verdict = Verdict("Edits collapse | it", "A, fig. 1", "77 (recalled)", "some edit raises perplexity tenfold")
    for number, each in enumerate(holds):
        verdict.of(f"model-{number}", f"{number} of 9", each)
    return verdict


@pytest.mark.parametrize(
    ("holds", "outcome"),
    [
        ([True, True], "holds"),
        ([False, False], "does not hold"),
        ([True, False], "partly"),
        ([True, "partly"], "partly"),
        (["partly"], "partly"),
        ([True, None], "holds"),
        ([None], "undecided"),
        ([], "undecided"),
    ],
)
def test_a_claim_holds_where_all_measured_models_agree(holds, outcome):
    assert claim(*holds).outcome == outcome


def test_a_verdict_takes_numpy_truth_and_refuses_other_words():
    assert claim(np.bool_(False)).outcome == "does not hold"
    with pytest.raises(MethodError, match="holds must be"):
        claim("mostly")


def test_the_table_says_model_by_model_what_was_measured():
    (row,) = verdicts.table([claim(True, False)]).to_dict("records")
    assert row["measured here"] == "model-0: 0 of 9 (holds); model-1: 1 of 9 (does not hold)"
    assert row["verdict"] == "partly" and row["published"] == "77 (recalled)"
    assert "tenfold" in row["holds where"] and row["claim"] == "Edits collapse | it (A, fig. 1)"


def test_saved_tables_are_collected_in_the_order_of_their_notebooks(tmp_path):
    for name in ("03_verdicts", "01_verdicts"):
        path = plots.save_verdicts([claim(True)], name, f"n = 9, of {name}.", tmp_path)
        assert path == tmp_path / f"{name}.md"
    (tmp_path / "01_other.md").write_text("no verdict")
    text = verdicts.collect(tmp_path).read_text()
    assert text.index("## 01\n") < text.index("n = 9, of 01_verdicts.") < text.index("## 03\n")
    assert "no verdict" not in text
    rows = [line for line in text.splitlines() if line.startswith("| Edits")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [4, 4, 6, 6]
    assert rows[1] == "| Edits collapse \\| it (A, fig. 1) | holds | `03` |"


def test_a_folder_without_verdicts_gets_no_file(tmp_path):
    assert verdicts.collect(tmp_path) is None and not list(tmp_path.iterdir())


def committed_tables(root: Path, folder: Path) -> list[Path]:
    """The tables of verdicts as staged or committed, since the files may be those of a `make figures`, which is of a
    small size and replaces them. Without a repository, the files."""
    git = ["git", "-C", str(root)]
    listed = [*git, "ls-files", "figures/*_verdicts.md"]
    names = subprocess.run(listed, capture_output=True, text=True).stdout.split() if shutil.which("git") else []
    for name in names:
        shown = subprocess.run([*git, "show", f":{name}"], check=True, capture_output=True)
        (folder / Path(name).name).write_bytes(shown.stdout)
    return sorted((folder if names else root / "figures").glob("*_verdicts.md"))


def test_the_readme_shows_the_verdicts_of_the_committed_figures(tmp_path):
    root = Path(__file__).parent.parent
    tables = committed_tables(root, tmp_path)
    assert len(tables) > 1
    assert verdicts.in_short(tables) in (root / "README.md").read_text(encoding="utf-8")


def test_an_interval_that_holds_the_bound_decides_nothing():
    ends = [(0.0, 0.39), (0.61, 1.0), (0.3, 0.9), (np.nan, np.nan)]
    decided = [below(*interval, 0.5) for interval in ends]
    assert decided == [True, False, None, None] and [unless(each) for each in decided] == [False, True, None, None]
    assert all_of(True, True) is True and all_of(True, None) is None and all_of(None, False) is False
