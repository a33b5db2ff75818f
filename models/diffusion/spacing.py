"""Which timesteps of a long diffusion a short chain visits.

Source: Improved DDPM, Nichol & Dhariwal, ICML 2021, arXiv:2102.09672, section 4; DDIM, Song et al., ICLR 2021,
arXiv:2010.02502, for equal strides.
"""

import re
from itertools import accumulate, repeat

from conf.errors import UserError


def spaced(spacing: str | int, steps: int) -> list[int]:
    """The timesteps to visit, ascending, of `steps` in all.

    Args:
        spacing: "" for all; a number such as 250, spread evenly from the first to the last; several such as "10,20,30"
            for as many equal sections, each with its own number; "ddim50" for 50 at one whole stride.
        steps: of the whole diffusion.

    Raises:
        ValueError: no such spacing, or more timesteps than there are.
    """
    text = str(spacing).replace(" ", "")
    if text == "":
        return list(range(steps))
    if match := re.fullmatch(r"ddim(\d+)", text):
        return _strided(int(match[1]), steps)
    if not re.fullmatch(r"\d+(,\d+)*", text) or isinstance(spacing, bool):
        raise UserError(
            f"spacing: must be empty, numbers of steps such as 250 or '10,20', or 'ddim50', got {spacing!r}; "
            "set task.sampling.steps"
        )
    counts = [int(count) for count in text.split(",")]
    size, longer = divmod(steps, len(counts))
    lengths = [size + (section < longer) for section in range(len(counts))]
    for count, length in zip(counts, lengths, strict=True):
        if not 1 <= count <= length:
            raise UserError(
                f"spacing: from 1 to {length} steps fit into {'a section of ' if len(counts) > 1 else ''}the diffusion "
                f"of {steps}, got {count}; set task.sampling.steps"
            )
    starts = accumulate(lengths[:-1], initial=0)
    return [start + t for start, n, k in zip(starts, lengths, counts, strict=True) for t in _even(n, k)]


def _even(length: int, count: int) -> list[int]:
    """`count` of `length` timesteps, from the first to the last; one alone is the first.

    The stride is summed up, not multiplied: with its rounding errors as in the authors' code, which decide halves.
    """
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    return [round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]


def _strided(count: int, steps: int) -> list[int]:
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise UserError(
        f"spacing: no whole stride gives {count} of {steps} steps, got 'ddim{count}'; "
        f"set task.sampling.steps={count} for a spacing that is not whole"
    )
