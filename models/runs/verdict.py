"""Whether an evaluation gives what its recipe promises."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from conf import recipes
from conf.compose import compose_run
from models.runs.identity import without_backend

# What decides a figure besides the weights; paths, batch sizes and what only training uses do not.
JUDGED = ("image_size", "attention", "model", "data")
FREE = ("model.attention", "model.image_size", "model.drop_path", "data.image_size", "data.root")
FREE += ("data.source.root", "data.batch_size", "data.workers", "data.timeout", "data.augment", "data.seed")
FREE += ("data.token_labels", "data.drop_last", "data.on_error", "data.num_classes", "model.num_classes")
FREE += ("sampling.seed", "sampling.batch_size")
FREE_BELOW = ("model.attention.", "data.augment.")  # copies of other settings, and of training


class Verdict(NamedTuple):
    """`reproduced`, None where nothing is published or measured here; and the sentence that says by how much not."""

    reproduced: bool | None
    text: str


def judge(recipe: str, figures: dict[str, Any], differences: list[str]) -> Verdict:
    """Compares the figure that a recipe's `target` names with the published value.

    Args:
        recipe: its name.
        figures: measured, as fractions, by metric.
        differences: what was not as in the recipe, see `deviations`: then nothing is reproduced.
    """
    target = recipes.load(recipe).target
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    otherwise = f", with {', '.join(differences[:3])}{more}" if differences else ""
    if target.metric == "fid":
        return Verdict(None, f"not judged: {_elsewhere(target)}{otherwise}")
    if target.value is None:
        measured = f": {target.metric} {100 * figures[target.metric]:.3f} %" if target.metric in figures else ""
        return Verdict(None, f"nothing published to compare with{measured}{otherwise}")
    if target.metric not in figures:
        text = f"{target.metric} was not measured, as the weights have no average, published {_published(target)}"
        return Verdict(False, f"not reproduced: {text}; val/top1 is {100 * figures['val/top1']:.3f} %{otherwise}")
    measured, allowed = 100 * figures[target.metric], target.tolerance
    difference = round(measured - target.value, 3) + 0.0
    text = f"{target.metric} {measured:.3f} %, published {_published(target)}, {difference:+.3f} points"
    if differences:
        return Verdict(False, f"not reproduced: {text}{otherwise}")
    if difference < -allowed:
        return Verdict(False, f"not reproduced: {text}, {allowed} less are allowed")
    surprise = ", which is more than runs differ by: is it the right data?" if difference > allowed else ""
    return Verdict(True, f"reproduced: {text}, {allowed} less are allowed{surprise}")


def _published(target: DictConfig) -> str:
    return f"{target.value} % ({target.paper})"


def _elsewhere(target: DictConfig) -> str:
    """What is published about samples, and how that is measured."""
    return (
        f"FID is not computed here, published {target.value} ({target.paper}) for {target.samples:,} samples after "
        f"{target.steps:,} steps; write as many with samples={target.samples} and measure the file with the evaluation "
        "suite of openai/guided-diffusion"
    )


def deviations(recipe: str, given: dict[str, Any], images: int, measured: int) -> list[str]:
    """What an evaluation does otherwise than the recipe, as `key=value instead of value`.

    Args:
        recipe: its name.
        given: the resolved configuration of the evaluation.
        images: in the validation data.
        measured: of them.
    """
    cfg, choices = compose_run([f"recipe={recipe}"])
    if given["run"]["data"] != choices["data"]:
        return [f"data={given['run']['data']} instead of {choices['data']}"]
    wanted, found = dict(_leaves(_judged(cfg))), dict(_leaves(_judged(given)))
    keys = [key for key in wanted if key not in FREE and not key.startswith(FREE_BELOW)]
    changed = [key for key in keys if found.get(key) != wanted[key]]
    added = [key for key in found if key.endswith("._target_") and key not in wanted]  # parts and places of a model
    texts = [f"{key}={found.get(key)} instead of {wanted.get(key)}" for key in changed + added]
    target = recipes.load(recipe).target
    if "samples" in target:
        made = given.get("samples") or 0
        return texts + ([f"{made:,} of {target.samples:,} samples"] if made != target.samples else [])
    if (images, measured) != (target.images, target.images):
        texts.append(f"{min(images, measured):,} of {target.images:,} images")
    return texts


def _judged(config: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """What decides a figure besides the weights."""
    node = {key: config[key] for key in JUDGED}
    if "sampling" in (config.get("task") or {}):
        node["sampling"] = config["task"]["sampling"]
    plain = {key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in node.items()}
    return {key: without_backend(value) for key, value in plain.items()}


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its path; a list is one value."""
    if not isinstance(node, dict):
        yield path, node
        return
    for name, value in node.items():
        yield from _leaves(value, f"{path}.{name}" if path else str(name))
