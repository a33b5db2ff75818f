"""What the fused operations are meant to reach on an H200 in bfloat16, as ratios measured side by side in one run.

They come from the bytes of the authors' code against the least (`kernels/bench/counting.py` counts both) at 80 % of the
copy bandwidth, with half to two thirds of the prediction as the commitment. None is a measurement.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """At least so many times faster, at most such a share of memory, at least such a share of the copy bandwidth.

    forward, training: than the authors' way; training is forward and backward, as is everything below.
    compiled: than the authors' way under torch.compile. pytorch: than the best plain PyTorch.
    memory: of the authors' peak. bandwidth: moving the least bytes of the fused model.
    """

    forward: float | None = None
    training: float | None = None
    compiled: float | None = None
    pytorch: float | None = None
    memory: float | None = None
    bandwidth: float | None = None

    def __str__(self) -> str:
        both = "/".join("-" if r is None else f"{r:g}" for r in (self.forward, self.training))
        parts = [
            f"official {both}" if (self.forward or self.training) else "",
            f"compiled {self.compiled:g}" if self.compiled else "",
            f"pytorch {self.pytorch:g}" if self.pytorch else "",
            f"memory 1/{1 / self.memory:g}" if self.memory else "",
            f"bandwidth {self.bandwidth:.0%}" if self.bandwidth else "",
        ]
        return ", ".join(p for p in parts if p)


# by operation; the first whose text is in the name of the stage
TARGETS: dict[str, tuple[tuple[str, Target], ...]] = {
    "routed_attention": (
        ("1024 px", Target(training=20, compiled=4, memory=1 / 30)),
        ("512 px", Target(training=10, compiled=4)),
        ("224 px", Target(8, 15, compiled=4, memory=1 / 5, bandwidth=0.6)),
    ),
    "window_attention": (("", Target(5, 5, compiled=2, pytorch=1.5, memory=1 / 3, bandwidth=0.6)),),
    "channel_attention": (("", Target(4, 4, compiled=2, memory=1 / 2, bandwidth=0.6)),),
    "agent_attention": (("", Target(4, 5, compiled=2.5, memory=1 / 3, bandwidth=0.6)),),
    "focused_linear_attention": (("", Target(8, 12, compiled=3, memory=1 / 4, bandwidth=0.6)),),
    "inline_attention": (("", Target(5, 8, compiled=3, memory=1 / 4, bandwidth=0.6)),),
    "moh_attention": (("", Target(2, 2, compiled=1.3, memory=1 / 2)),),
    "aggregated_attention": (("", Target(10, 8, memory=1 / 8)),),
    "depthwise_conv": (("", Target(pytorch=3, bandwidth=0.7)),),
}


def target_of(operation: str, stage: str, batch: int) -> Target | None:
    """What this stage is meant to reach, or None. A single image is bound by launches, and has no target."""
    if batch == 1:
        return None
    return next((target for text, target in TARGETS.get(operation, ()) if text in stage), None)
