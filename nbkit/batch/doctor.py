"""Whether an installation is sound: each thing that a run needs, tried as a run would, with what to do if it fails.

    for finding in examine():
        print(finding)
"""

import importlib
import importlib.metadata
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

import nbkit
from nbkit import paths
from nbkit.batch.kernels import Kernel
from nbkit.errors import NbkitError
from nbkit.records import embedded
from nbkit.records.files import prove_writable

INSTALL = "install it anew: `make test`, or `python -m pip install -e .`"
MODULES = {"scikit-learn": "sklearn"}  # distributions whose module is called otherwise, but for - and _
LOSS_MARGIN = 0.7  # nats a token by which held-out text may be worse than the last steps of the training
N_LOGGED = 10  # steps of the training log that are averaged
N_TEXTS = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    what: str
    found: str
    remedy: str | None = None  # what to do about it; None where all is well

    def __str__(self):
        return f"{'ok ' if self.remedy is None else 'BAD'} {self.what}: {self.found}" + (
            f"\n    to do: {self.remedy}" if self.remedy else ""
        )


def examine() -> Iterator[Finding]:
    """What was found, one thing after the other as it is tried; takes some seconds."""
    yield from packages()
    yield gpu()
    yield from models()
    yield kernel()
    yield from folders()


def packages() -> Iterator[Finding]:
    """Every declared package: there, of a version within its bounds, and importable."""
    try:
        declared = importlib.metadata.requires("nbkit") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("nbkit", "is not installed in this Python", INSTALL)
        return
    for text in declared:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package(requirement)


def package(requirement: Requirement) -> Finding:
    name = requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "is not installed", INSTALL)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, f"{version} is installed, and {requirement.specifier} needed", INSTALL)
    try:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # whatever a broken package raises when it is imported
        return Finding(name, f"{version} cannot be imported: {type(error).__name__}: {error}", INSTALL)
    return Finding(name, version)


def gpu() -> Finding:
    """The GPU that models are loaded on, if there is one; none is no fault, one that torch cannot use is."""
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", f"{torch.cuda.get_device_name()}, used by default")
    if Path("/proc/driver/nvidia/version").exists():
        return Finding(
            "GPU",
            f"there is an NVIDIA driver, which torch {torch.__version__} cannot use",
            "install the CUDA build: `NBKIT_TORCH=cuda make clean test`; or pass device='cpu' if that is meant",
        )
    return Finding("GPU", "none; models are loaded on the CPU")


def models() -> Iterator[Finding]:
    """Every embedded model: loads, and reads held-out text about as well as the last steps of its training."""
    names = embedded.embedded_models()
    if not names:
        yield Finding("models", f"none in {paths.DATA / 'models'}", "check the project out whole, or set NBKIT_DATA")
    for name in names:
        yield model(name)


def model(name: str) -> Finding:
    remedy = f"restore data/models/{name} (`git checkout`), or train it anew: `make miniworld MODEL={name}`"
    try:
        lm = nbkit.load(name, device="cpu")
        log = paths.DATA / "models" / name / "training_log.jsonl"
        if lm.architecture.side or not log.is_file():  # one that is read of only, or made without a log
            return Finding(f"model {name}", f"loads, hash {lm.hash[:12]}")
        texts = nbkit.read_texts(embedded.MODELS.get(name, "miniworld"), limit=N_TEXTS)
        loss = math.log(nbkit.perplexity(lm, texts, kind="token"))
        steps = [json.loads(line)["loss"] for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (NbkitError, OSError, ValueError, KeyError) as error:
        return Finding(f"model {name}", str(error), remedy)
    trained = sum(steps[-N_LOGGED:]) / len(steps[-N_LOGGED:])
    found = f"hash {lm.hash[:12]}, {loss:.2f} nats a token of held-out text, {trained:.2f} at the end of its training"
    return Finding(f"model {name}", found, None if loss < trained + LOSS_MARGIN else remedy)


def kernel() -> Finding:
    """Jupyter's kernel: starts, and answers."""
    try:
        with Kernel(Path.cwd()) as started:
            reply = started.ask(lambda client: client.kernel_info(reply=True, timeout=30))
    except Exception as error:  # whatever a kernel that does not come up raises
        return Finding("Jupyter kernel", f"does not start: {type(error).__name__}: {error}", INSTALL)
    return Finding("Jupyter kernel", reply["content"]["banner"].splitlines()[0])


def folders() -> Iterator[Finding]:
    """The folders that runs and figures are written to."""
    for folder, setting in ((paths.RUNS, "NBKIT_RUNS"), (paths.figures(paths.ROOT / "figures"), "NBKIT_FIGURES")):
        there = next(each for each in (folder, *folder.parents) if each.exists())  # a run makes what is missing
        try:
            prove_writable(there)
        except OSError as error:
            yield Finding(f"folder {folder}", f"cannot be written: {error.strerror}", f"set {setting} to another one")
        else:
            yield Finding(f"folder {folder}", "can be written")
