"""Whether an evaluation gives what its recipe promises."""

from typing import Any, NamedTuple

import recipes


class Verdict(NamedTuple):
    """`reproduced`, and the sentence that says by how much not."""

    reproduced: bool
    text: str


def judge(recipe: str, target: dict[str, Any], figures: dict[str, Any], data: str) -> Verdict:
    """Compares the figure that a recipe's `target` names with the published value.

    Args:
        recipe: its name, for the data that the target is of.
        target: `metric`, `value` (percent), `tolerance` (points) and `paper`.
        figures: measured, as fractions, by metric.
        data: what they were measured on; on other data than the recipe's nothing is reproduced.
    """
    measured, wanted = 100 * figures[target["metric"]], target["value"]
    difference = round(measured - wanted, 3)  # percent are given with one digit, accuracies are multiples of 0.002
    text = (
        f"{target['metric']} {measured:.2f} %, published {wanted} % ({target['paper']}), {difference + 0.0:+.2f} points"
    )
    if data != (meant := data_of(recipe)):
        return Verdict(False, f"not reproduced: {text}, measured on {data} instead of {meant}")
    reproduced = difference >= -target["tolerance"]
    return Verdict(
        reproduced, f"{'' if reproduced else 'not '}reproduced: {text}, {target['tolerance']} less are allowed"
    )


def data_of(recipe: str) -> str:
    """The option of `data=` that a recipe chooses."""
    chosen = [entry for entry in recipes.load(recipe).defaults if "override /data" in entry]
    return chosen[0]["override /data"]
