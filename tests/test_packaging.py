"""What the project promises about itself: dependencies, imports, committed notebooks, the choice of torch's build."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import install
import nbkit
from nbkit.batch.parameters import declared

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch", "lm-eval": "lm_eval"}  # where conda-forge's name differs from PyPI's


def split(requirement):
    """("name", {">=1.2", "<1.3"}) of a requirement in either spelling."""
    name, bounds = re.fullmatch(r"([\w-]+) ?(.*)", requirement).groups()
    return name, frozenset(bounds.split(","))


def test_environment_and_pyproject_hold_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = dict(split(entry) for entry in environment["dependencies"] if isinstance(entry, str))
    *of_pip, itself = environment["dependencies"][-1]["pip"]
    assert conda.pop("python") == {PROJECT["requires-python"]}
    conda.pop("pip")
    own = dict(split(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert conda | dict(map(split, of_pip)) == {CONDA_NAMES.get(name, name): bounds for name, bounds in own.items()}
    assert itself == "-e ."


def test_every_requirement_has_both_bounds():
    extras = PROJECT["optional-dependencies"].values()
    for requirement in [*PROJECT["dependencies"], *(r for extra in extras for r in extra)]:
        if not requirement.startswith("nbkit["):
            assert re.fullmatch(r"[\w\[\]-]+>=[\d.]+,<[\d.]+", requirement), requirement


def python(code):
    """Run code in a fresh interpreter, and return what it printed."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_quick_and_without_torch():
    code = (
        "import sys, time; start = time.process_time(); import nbkit; dir(nbkit); "
        "print(time.process_time() - start, sum(m in sys.modules for m in ('torch', 'pandas', 'numpy', 'papermill')))"
    )
    tried = [python(code).split() for _ in range(3)]  # other work on the machine may slow one down
    assert min(float(seconds) for seconds, _ in tried) < 0.3
    assert {heavy for _, heavy in tried} == {"0"}


def test_what_needs_no_model_never_imports_torch():
    modules = ["errors", "paths", "architectures", "records", "records.results", "records.requests", "plots", "batch"]
    code = "import sys; from importlib import import_module as load\n" + "\n".join(
        f"load('nbkit.{module}'); assert 'torch' not in sys.modules, '{module} imports torch'" for module in modules
    )
    python(code)


@pytest.mark.parametrize("name", nbkit.__all__)
def test_every_public_name_resolves(name):
    assert name in dir(nbkit)
    assert getattr(nbkit, name) is not None


def test_modules_need_no_import_of_their_own():
    assert python("import nbkit; print(nbkit.records.__name__, 'plots' in dir(nbkit))") == (
        "nbkit.records True"
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'edti'"):
        nbkit.edti  # noqa: B018


# --- notebooks as committed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert not {"widgets", "papermill"} & set(notebook["metadata"])
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "run nbstripout"
        assert not {"papermill", "execution"} & set(cell["metadata"]), "run nbstripout"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_declare_documented_parameters_in_their_second_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert "parameters" in cells[1]["metadata"].get("tags", [])
    parameters = declared(path)
    assert parameters
    for parameter in parameters.values():
        assert parameter.help, f"{parameter.name} has no comment"


# --- which build of torch ---------------------------------------------------------------------------------------------

NEEDS = "torch>=2.13,<2.14"
DEFAULT = ["2.14.0", "2.13.1", "2.13.0", "2.12.1"]  # what the default index lists: on Linux CUDA builds
MIXED = ["2.14.0+cpu", "2.13.1", "2.13.0+cpu", "2.13.0"]  # with CPU builds from a further folder or index


@pytest.mark.parametrize(
    ("wanted", "system", "versions", "plan"),
    [
        ("cpu", "Linux", MIXED, ("pip", "torch==2.13.0+cpu", None)),
        ("cpu", "Linux", DEFAULT, ("uv", NEEDS, "cpu")),
        ("cpu", "Linux", ["2.13.0+cu130"], ("uv", NEEDS, "cpu")),
        ("cpu", "Linux", [], ("uv", NEEDS, "cpu")),
        ("cpu", "Darwin", DEFAULT, ("pip", NEEDS, None)),
        ("cpu", "Windows", DEFAULT, ("pip", NEEDS, None)),
        ("cpu", "Windows", ["2.13.0+cu130", "2.13.0"], ("pip", f"{NEEDS},!=2.13.0+cu130", None)),
        ("cuda", "Linux", DEFAULT, ("pip", NEEDS, None)),
        ("cuda", "Linux", MIXED, ("pip", f"{NEEDS},!=2.13.0+cpu", None)),
        ("cuda", "Linux", ["2.13.0+cpu"], ("uv", NEEDS, "auto")),
        ("cuda", "Windows", DEFAULT, ("uv", NEEDS, "auto")),
    ],
)
def test_torch_plan(wanted, system, versions, plan):
    assert install.torch_plan(wanted, system, versions, NEEDS) == plan


def test_the_bounds_on_torch_are_read_from_pyproject():
    requirement = install.torch_requirement()
    assert requirement in PROJECT["dependencies"]
    import torch

    assert install.within(torch.__version__, requirement)
    assert not install.within("2.99.0", requirement)
    assert not install.within("2.13.0rc1", requirement)


@pytest.mark.parametrize(("status", "driver"), [(0, True), (9, False)])
def test_a_driver_is_one_that_answers(status, driver, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nexit {status}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(install.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert install.has_nvidia_driver() is driver


def test_without_a_cpu_build_nothing_is_downloaded_and_the_message_says_what_to_do(monkeypatch):
    installed = []
    monkeypatch.setattr(install, "offered_versions", lambda: DEFAULT)
    monkeypatch.setattr(install, "pip", lambda *arguments: installed.extend(arguments))
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="NBKIT_TORCH=cuda"):
        install.install_torch("cpu", NEEDS)
    assert installed == ["uv"]


def test_a_notebook_that_lab_has_run_and_saved_is_no_change_for_git(tmp_path):
    """`make filter`, which `make lab` runs, tells git what of a saved notebook is not the notebook."""
    name = "01_single_edit_collapse.ipynb"
    for path in (ROOT / "Makefile", ROOT / "notebooks" / name):
        shutil.copy(path, tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run(["make", "-C", str(tmp_path), "filter", f"RUN={sys.executable}"], check=True, capture_output=True)
    saved = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    saved["metadata"]["language_info"] |= {
        "codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py", "mimetype": "text/x-python",
        "nbconvert_exporter": "python", "pygments_lexer": "ipython3", "version": "3.11.7",
    }  # fmt: skip
    saved["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    code = next(cell for cell in saved["cells"] if cell["cell_type"] == "code")
    code |= {"execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["said"]}]}
    code["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    (tmp_path / name).write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    changed = subprocess.run([*git, "diff", "--stat"], check=True, capture_output=True, text=True).stdout
    assert changed == ""
    code["source"] = ["other"]
    (tmp_path / name).write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert name in subprocess.run([*git, "diff", "--stat"], check=True, capture_output=True, text=True).stdout
