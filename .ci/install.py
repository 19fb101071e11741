"""Install nbkit into the environment of the Python that runs this file: the right torch first, then everything else.

The Makefile runs it in a new `.venv`, before anything is installed there, so it uses the standard library only:

    .venv/bin/python -I .ci/install.py dev          # the arguments are extras

Why torch goes first: on Linux the default package index serves the CUDA build, which drags in gigabytes of NVIDIA
libraries, and builds for the CPU are marked only by a local version such as 2.13.0+cpu. So the build is chosen by
whether this machine has an NVIDIA driver, and everything after is installed under the constraint of that very torch.
A torch that is already there and within pyproject.toml's bounds is kept.

NBKIT_TORCH=cpu or NBKIT_TORCH=cuda overrides the detection (on a cluster: cuda, when the login node has no GPU).
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Plan(NamedTuple):
    """How to get torch: "pip" with a requirement, or "uv" (which knows torch's own indexes) with a backend too."""

    installer: str
    requirement: str
    backend: str | None = None


def has_nvidia_driver():
    """True when a driver answers: nvidia-smi succeeds, or libcuda starts and counts at least one device."""
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        try:
            if subprocess.run([smi, "-L"], capture_output=True, timeout=60).returncode == 0:
                return True
        except (OSError, subprocess.TimeoutExpired):
            pass  # a broken nvidia-smi says nothing; ask the library
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def torch_requirement():
    """pyproject.toml's requirement on torch, such as "torch>=2.13,<2.14"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(r for r in project["dependencies"] if re.match(r"torch\s*[<>=]", r))


def release(version):
    """(2, 13, 0) of "2.13.0+cpu"; None for a pre-release."""
    public = version.split("+")[0]
    return tuple(int(part) for part in public.split(".")) if re.fullmatch(r"\d+(\.\d+)*", public) else None


def within(version, requirement):
    """Whether a version meets a requirement of the form name>=low,<high."""
    low, high = re.fullmatch(r"[\w-]+>=([\d.]+),<([\d.]+)", requirement).groups()
    found = release(version)
    return found is not None and release(low) <= found < release(high)


def torch_plan(wanted, system, versions, requirement):
    """Choose where torch comes from; pure, so that every kind of machine can be tested on one.

    wanted: "cpu" or "cuda"; system: platform.system(); versions: what pip's own indexes offer for this Python.
    """
    offered = [v for v in versions if within(v, requirement)]
    cpu = [v for v in offered if v.endswith("+cpu")]
    other_local = [v for v in offered if "+" in v and v not in cpu]
    if system == "Darwin":  # one build, and it has no CUDA
        return Plan("pip", requirement)
    if wanted == "cpu":
        if cpu:
            return Plan("pip", f"torch=={max(cpu, key=release)}")
        if system == "Windows":  # the default index's build is for the CPU there; CUDA ones are marked as local
            return Plan("pip", ",".join([requirement, *(f"!={v}" for v in other_local)]))
        return Plan("uv", requirement, "cpu")
    if other_local or (system == "Linux" and len(offered) > len(cpu)):
        return Plan("pip", ",".join([requirement, *(f"!={v}" for v in cpu)]))
    return Plan("uv", requirement, "auto")


def offered_versions():
    """The versions of torch that pip finds for this Python: reads the index pages, downloads no package."""
    found = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "torch"], stdout=subprocess.PIPE, text=True, timeout=600
    )
    listed = re.search(r"^Available versions: (.*)$", found.stdout, re.MULTILINE)
    return listed.group(1).split(", ") if listed else []


def installed_torch():
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)


def install_torch(wanted, requirement):
    """Install the build that torch_plan chose."""
    plan = torch_plan(wanted, platform.system(), offered_versions(), requirement)
    print(f"torch: the {wanted} build, {plan.requirement} by {plan.installer}", flush=True)
    if plan.installer == "pip":
        return pip(plan.requirement)
    pip("uv")
    target = ["--python", sys.executable, "--torch-backend", plan.backend]
    uv = subprocess.run([sys.executable, "-m", "uv", "pip", "install", *target, plan.requirement])
    if uv.returncode:
        sys.exit(no_build(wanted, requirement))


def no_build(wanted, requirement):
    """The message when no suitable build of torch can be had."""
    python = ".".join(platform.python_version_tuple()[:2])
    kept_back = "The CUDA build was not downloaded in its place.\n" if wanted == "cpu" else ""
    other = {"cpu": "cuda", "cuda": "cpu"}[wanted]
    return (
        f"\nNo {wanted} build of {requirement} for Python {python} could be had: pip's indexes list none, and uv could "
        f"not fetch\none from torch's own index (its message is above). {kept_back}"
        "What helps: a connection to that index; an index or folder with such a build in pip's configuration\n"
        f"(`pip config set global.find-links FOLDER`); another Python (`make ... PYTHON=python3.11`); "
        f"or NBKIT_TORCH={other}\nto take the other build."
    )


def main(extras):
    requirement = torch_requirement()
    if (present := installed_torch()) is None or not within(present, requirement):
        wanted = os.environ.get("NBKIT_TORCH") or ("cuda" if has_nvidia_driver() else "cpu")
        if wanted not in ("cpu", "cuda"):
            sys.exit(f"NBKIT_TORCH is {wanted!r}; it can be cpu or cuda")
        install_torch(wanted, requirement)
    with tempfile.TemporaryDirectory() as folder:
        # nothing that is installed later may exchange this torch for another build
        constraint = Path(folder) / "constraint.txt"
        constraint.write_text(f"torch=={metadata.version('torch')}\n", encoding="utf-8")
        pip("--constraint", str(constraint), "--editable", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:  # pip has said why
        sys.exit(f"\ninstallation failed: {' '.join(map(str, error.cmd[2:]))}\nRun the same command again to continue.")
