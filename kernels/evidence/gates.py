"""What the code of a step's kernels must be, and what is recorded of it.

tests/kernels/steps.json has what one version of Triton makes of a step: launches and variants, and of each kernel the
fewest programs on a multiprocessor. tests/kernels/known_faults.json lists what is wrong today, by gate and kernel, with
the worst number: nothing may be added or grow, and what has become better is lowered by `--record`.
"""

import json
from pathlib import Path

from kernels.evidence.report import Read

FOLDER = Path(__file__).parents[2] / "tests" / "kernels"
RECORDED, KNOWN = FOLDER / "steps.json", FOLDER / "known_faults.json"
SHARED_LIMIT = 99 * 1024  # of a program on sm_86, sm_89 and sm_120
SPILL_LIMIT = 256  # bytes, with a Triton that is not the recorded one

Faults = dict[str, dict[str, int]]


def faults_of(reads: list[Read]) -> Faults:
    """By gate and "target operation kernel", the worst of the variants."""
    found: Faults = {gate: {} for gate in GATES}
    for one in reads:
        for row in one.rows:
            key = f"{one.target} {row.operation} {row.kernel}"
            for gate, measure in GATES.items():
                if worst := measure(row):
                    found[gate][key] = max(worst, found[gate].get(key, 0))
    return {gate: dict(sorted(of.items())) for gate, of in found.items()}


SPILLED, SHARED = "spilled bytes", "shared memory above 99 KB"
# number that is wrong, 0 if nothing is
GATES = {
    "narrow loads: of 16-bit tiles, 1 or 2 bytes each": lambda row: row.narrow_loads,
    "idle barriers: in loops without a product": lambda row: row.idle_barriers,
    SPILLED: lambda row: row.spilled,
    SHARED: lambda row: max(0, row.shared - SHARED_LIMIT),
}


def pins_of(one: Read) -> dict:
    """What is recorded of a step."""
    fewest: dict[str, list[int]] = {}
    for row in one.rows:
        entry = fewest.setdefault(f"{row.operation} {row.kernel}", [0, row.blocks])
        entry[0] += row.times
        entry[1] = min(entry[1], row.blocks)
    return {"launches": one.launches, "variants": one.variants, "kernels": dict(sorted(fewest.items()))}


def problems(reads: list[Read], version: str) -> list[str]:
    """What is not as recorded, and what is worse than is known.

    With another Triton, or for a target of which nothing is recorded, only what every chip needs is judged. When all
    steps that are recorded were read, also what is listed as wrong and is not.
    """
    recorded, known = _read(RECORDED), _read(KNOWN)
    same, steps = recorded.get("triton") == version, recorded.get("steps", {})
    found = [line for one in reads for line in _differences(one, steps, same)]
    for gate, of in faults_of(reads).items():
        for key, worst in of.items():
            strict = same and key.partition(" ")[0] in _targets(steps)
            limit = known.get(gate, {}).get(key, 0)
            if not strict and gate == SPILLED:
                limit = max(limit, SPILL_LIMIT)
            if worst > limit and (strict or gate in (SPILLED, SHARED)):
                found.append(f"{key}: {gate}: {worst}, at most {limit}")
    return found + (mended(reads) if same and _is_whole(reads, steps) else [])


def mended(reads: list[Read]) -> list[str]:
    """What is listed as wrong and is not, or less so, in these steps."""
    found = faults_of(reads)
    return [
        f"{key}: {gate}: {found[gate].get(key, 0)}, listed as {listed}; lower it with --record"
        for gate, of in _read(KNOWN).items()
        for key, listed in of.items()
        if found[gate].get(key, 0) < listed
    ]


def record(reads: list[Read], version: str) -> list[str]:
    """Writes what these steps are, and lowers what is listed as wrong if these are all; what is worse is returned.

    What is wrong for a target of which nothing was recorded, or with another Triton, is listed as it is found.
    """
    old = _read(RECORDED)
    kept = old.get("triton") == version
    steps = dict(old["steps"]) if kept else {}
    steps |= {_key(one): pins_of(one) for one in reads}
    RECORDED.write_text(_written({"triton": version, "steps": dict(sorted(steps.items()))}, 3))
    found, known, before = faults_of(reads), _read(KNOWN), _targets(old.get("steps", {}) if kept else {})
    for gate in GATES:
        listed, now = known.get(gate, {}), found[gate]
        if _is_whole(reads, steps):
            listed = {key: min(n, now.get(key, 0)) for key, n in listed.items()}
        listed |= {key: n for key, n in now.items() if key.partition(" ")[0] not in before}
        known[gate] = {key: n for key, n in sorted(listed.items()) if n}
    KNOWN.write_text(_written(known, 1))
    return problems(reads, version)


def _is_whole(reads: list[Read], steps: dict[str, dict]) -> bool:
    return set(steps) <= {_key(one) for one in reads}


def _targets(steps: dict[str, dict]) -> set[str]:
    return {key.rpartition(", ")[2] for key in steps}


def _differences(one: Read, steps: dict[str, dict], same: bool) -> list[str]:
    if _key(one) not in steps:
        return [f"{_key(one)}: not recorded"] if same else []
    was, now = steps[_key(one)], json.loads(json.dumps(pins_of(one)))
    what = ("launches", "variants", "kernels") if same else ("launches", "variants")
    return [f"{_key(one)}: {w}: {now[w]}, recorded: {was[w]}" for w in what if now[w] != was[w]]


def _key(one: Read) -> str:
    return f"{one.name}, {one.target}"


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _written(data: dict, depth: int) -> str:
    """JSON with what is below `depth` on one line."""

    def lines(value: object, level: int) -> str:
        if not isinstance(value, dict) or level > depth:
            return json.dumps(value)
        pad = "  " * (level + 1)
        inside = ",\n".join(f"{pad}{json.dumps(key)}: {lines(v, level + 1)}" for key, v in value.items())
        return f"{{\n{inside}\n{'  ' * level}}}" if value else "{}"

    return lines(data, 0) + "\n"
