"""What the fused operations are meant to reach on an H200 in bfloat16, as ratios measured side by side in one run.

None is a wish, and none a measurement: `caps.json` has what the machine code of the kernels leaves room for at each
stage (kernels/evidence/caps.py says how; `python -m kernels.compile --caps` writes it anew when kernels have changed).
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CAPS = Path(__file__).with_name("caps.json")
ALLOCATED = 1.1  # of the bytes that are counted: an allocator rounds up


@dataclass(frozen=True)
class Target:
    """At least so many times faster, at most such a share of memory, at least such a share of the copy bandwidth.

    forward, training: than the authors' way; training is forward and backward, as is everything below.
    pytorch: than the best plain PyTorch.
    memory: of the authors' peak. bandwidth: moving the least bytes of the fused model.
    """

    forward: float | None = None
    training: float | None = None
    pytorch: float | None = None
    memory: float | None = None
    bandwidth: float | None = None

    def __str__(self) -> str:
        both = "/".join("-" if r is None else f"{r:g}" for r in (self.forward, self.training))
        parts = [
            f"official {both}" if (self.forward or self.training) else "",
            f"pytorch {self.pytorch:g}" if self.pytorch else "",
            f"memory 1/{1 / self.memory:.2g}" if self.memory else "",
            f"bandwidth {self.bandwidth:.0%}" if self.bandwidth else "",
        ]
        return ", ".join(p for p in parts if p)


def target_of(operation: str, stage: str, batch: int) -> Target | None:
    """What this stage is meant to reach, or None. A single image is bound by launches, and has no target."""
    caps = caps_of_stages().get(operation, {}).get(stage)
    if batch == 1 or caps is None:
        return None
    return Target(
        forward=caps.get("official forward"),
        training=caps.get("official training"),
        pytorch=caps.get("pytorch training"),
        memory=caps["memory"] * ALLOCATED if "memory" in caps else None,
        bandwidth=caps["bandwidth"],
    )


@cache
def caps_of_stages() -> dict[str, dict[str, dict[str, float]]]:
    """What is recorded, by operation and stage."""
    return json.loads(CAPS.read_text())
