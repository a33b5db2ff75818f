"""What this machine has for the project, what it lacks, and how to mend it: `python eval.py doctor`."""

import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from packaging.requirements import Requirement

import kernels
from conf.names import CONF
from kernels.bench.calls import tensors_of
from kernels.bench.checking import problems
from kernels.operation import Operation
from models.probes import Report

ROOT = CONF.parent
OK, WARN = "ok", "warn"
SPACE = 5.0  # GB that a run should find
SHOWN = 6  # names in a line


class Finding(NamedTuple):
    """One line: what was looked at, `ok` or `warn`, what was found, and what helps."""

    what: str
    state: str
    found: str
    remedy: str = ""


def doctor(check_kernels: bool = True) -> Report:
    """Python, packages, GPU, kernels, W&B, data roots and disk.

    Args:
        check_kernels: run every operation and compare it with its definition; takes a minute on a GPU.
    """
    looks = [_python, _packages, _tested, _torch, _triton, _machine, _wandb, _roots, _disk]
    found = [finding for look in looks for finding in look()]
    if check_kernels:
        found += [_kernel(operation) for name in kernels.OPERATIONS for operation in kernels.operations_of(name)]
    rows = {f.what: f"{f.state}: {f.found}" + (f"; {f.remedy}" if f.remedy else "") for f in found}
    wrong = [finding.what for finding in found if finding.state != OK]
    said = f"{len(wrong)} to look at: {', '.join(wrong)}" if wrong else "nothing is wrong"
    gpu = "" if torch.cuda.is_available() else "; no GPU: of the kernels only the definitions in PyTorch were run"
    return Report({}, rows, lines=[said + gpu * check_kernels])


def _python() -> Iterator[Finding]:
    yield Finding("Python", OK, f"{platform.python_version()} in {sys.prefix}")  # an older one is refused before this


def _packages() -> Iterator[Finding]:
    """The bounds of requirements.txt, and of requirements-extra.txt where something of it is installed."""
    wrong = []
    for file, needed in (("requirements.txt", True), ("requirements-extra.txt", False)):
        for requirement in _requirements(ROOT / file):
            has = _version(requirement.name)
            if has is None and needed:
                wrong.append(f"{requirement.name} is missing")
            elif has is not None and not requirement.specifier.contains(has, prereleases=True):
                wrong.append(f"{requirement.name} {has} (wanted {requirement.specifier})")
    remedy = "python -m pip install --constraint constraints.txt --requirement requirements.txt"
    yield Finding(
        "packages", WARN if wrong else OK, _some(wrong) or "as requirements.txt asks", remedy if wrong else ""
    )


def _tested() -> Iterator[Finding]:
    """The versions that the suite passed with; others mostly work."""
    pairs = [(r.name, _version(r.name), str(r.specifier).lstrip("=")) for r in _requirements(ROOT / "constraints.txt")]
    there = [(name, has, tested) for name, has, tested in pairs if has is not None]
    other = [f"{name} {has} ({tested})" for name, has, tested in there if has.partition("+")[0] != tested]
    said = f"{len(there) - len(other)} of {len(there)} as in constraints.txt"
    yield Finding("tested versions", OK, said + (f"; others: {_some(other)}" if other else ""))


def _torch() -> Iterator[Finding]:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for HIP" if torch.version.hip else "for CPUs"
    yield Finding("torch", OK, f"{torch.__version__}, built {built}")
    if not torch.cuda.is_available():
        here = any(Path("/dev").glob("nvidia[0-9]*"))
        remedy = "nvidia-smi says whether the driver works; install a torch built with CUDA" if here else ""
        yield Finding("GPU", WARN if here else OK, "none that torch sees: everything runs on the CPU", remedy)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        said = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 1e9:.0f} GB, driver {_driver()}"
        yield Finding(f"GPU {index}", OK, said)


def _driver() -> str:
    """NVIDIA's, as the kernel of the system names it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _triton() -> Iterator[Finding]:
    has, gpu = _version("triton"), torch.cuda.is_available()
    remedy = "python -m pip install triton" if gpu and has is None else ""
    yield Finding("Triton", WARN if remedy else OK, has or "not installed: PyTorch computes everything", remedy)


def _machine() -> Iterator[Finding]:
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = load > cores
    remedy = "others compute here too: fewer threads are faster, OMP_NUM_THREADS=1" if busy else ""
    yield Finding("processor", WARN if busy else OK, f"{cores} cores, load {load:.1f}", remedy)


def _wandb() -> Iterator[Finding]:
    if _version("wandb") is None:
        yield Finding("W&B", WARN, "not installed", "python -m pip install wandb, or logger=csv")
        return
    if mode := os.environ.get("WANDB_MODE"):
        yield Finding("W&B", OK, f"WANDB_MODE={mode}")
        return
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
    waiting = len(list(Path.cwd().glob("outputs/**/wandb/offline-run-*")))
    said = "a key is there" if key else "no key: runs are kept offline"
    yield Finding(
        "W&B", OK, f"{said}{f', {waiting} offline runs wait' if waiting else ''}", "" if key else "wandb login"
    )


def _roots() -> Iterator[Finding]:
    """The folders that conf/local names."""
    for file in sorted((CONF / "local").glob("*.yaml")):
        for key, place in _places(yaml.safe_load(file.read_text()) or {}):
            there = Path(place).expanduser().is_dir()
            remedy = "" if there else f"mend {file.relative_to(ROOT)}"
            yield Finding(f"{file.stem} {key}", OK if there else WARN, place if there else f"no folder {place}", remedy)


def _places(node: dict, path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _places(value, f"{path}{key}.")
        elif key in ("root", "path", "data_dir") and isinstance(value, str) and value.startswith(("/", "~", ".")):
            yield f"{path}{key}", value


def _disk() -> Iterator[Finding]:
    place = Path.cwd()
    free, writable = shutil.disk_usage(place).free / 1e9, os.access(place, os.W_OK)
    remedy = "" if writable and free >= SPACE else "start runs in another folder" if not writable else "make room"
    said = f"{free:.0f} GB free in {place}" + ("" if writable else ", which cannot be written")
    yield Finding("disk", WARN if remedy else OK, said, remedy)


def _kernel(operation: Operation) -> Finding:
    """An operation on its smallest check: compared with its definition on a GPU, else the definition alone."""
    shape = min(operation.checks.values(), key=lambda shape: math.prod(shape.get("grid", (1,))[:2]) * shape["batch"])
    start = time.perf_counter()
    try:
        if torch.cuda.is_available():
            wrong = problems(operation, shape, torch.bfloat16)
        else:
            found = tensors_of(operation.reference(**operation.inputs("cpu", torch.float32, **shape)))
            wrong = [] if all(t.isfinite().all() for t in found) else ["the definition is not finite"]
    except Exception as error:  # whatever a compiler or a driver raises is what is looked for
        wrong = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    took = f"{time.perf_counter() - start:.1f} s"
    said = "as its definition" if torch.cuda.is_available() else "definition runs"
    remedy = "backend=torch computes it in PyTorch; please report it" if wrong else ""
    return Finding(f"kernel {operation.name}", WARN if wrong else OK, f"{_some(wrong) or said}, {took}", remedy)


def _requirements(file: Path) -> Iterator[Requirement]:
    for line in file.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text and not text.startswith("-"):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
