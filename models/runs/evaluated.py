"""What eval.py evaluates: the configuration of a checkpoint, of a recipe, or of a model and data that are named.

Torch-free until a checkpoint is read, as the whole command line.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from conf import cases, probes, text
from conf.compose import compose_run
from conf.errors import UserError
from conf.files import inside
from conf.folders import layout
from conf.names import PLACES, choosable, options
from models.checkpoints.packed import config_of
from models.runs.useful import OF_MODEL, is_weights, refuse_useless

CHOICES = ("recipe", "model", "attention", "data")
LOOKING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version", "--shell-completion", "-sc"}
# what an evaluation of samples takes from the task that a model was trained with
GENERATION = ("autoencoder", "diffusion_steps", "sampling", "score", "seed")


def take_config(given: list[str]) -> list[str]:
    """Offers Hydra what is evaluated, and gives the arguments that are left for it.

    Of several evaluations (`conf.cases`) this is the first; the arguments of the `others` stand in its configuration.
    """
    given = [f"probe={word}" if word in options("probe") else word for word in given]  # `eval.py doctor`
    first, *others = cases.cases(given)
    return offer(first, others)


def offer(given: list[str], others: list[list[str]] | None = None) -> list[str]:
    """Offers model and data to be evaluated to Hydra, as the config `from_checkpoint`.

    They come from the checkpoint of `ckpt=`. With `recipe=` the data, the preparation of images and the published
    result come from the recipe; where `ckpt=` is a file of weights alone, the model does too, or `model=` and `data=`
    name them. Of the arguments these choices are then left out: Hydra has no such groups in an evaluation.

    Raises:
        UserError: nothing to evaluate, or a setting that an evaluation does not use.
    """
    arguments = {key: text.plain(value) for key, _, value in (argument.partition("=") for argument in given) if value}
    looking = bool(LOOKING & set(given))
    probe = arguments.get("probe") or ("predict" if "input" in arguments else "accuracy")
    node: dict = {}
    if "ckpt" in arguments:
        node = _evaluated(arguments, None if looking else probe)
        task = node.get("run", {}).get("task")
        if probe == "accuracy" and "probe" not in arguments and task in options("probe"):
            probe = task  # generation, multilabel
    elif not looking:
        node = _without_checkpoint(arguments, probe)
    if not looking:
        refuse_useless(arguments, node, probe)
    if "probe" not in arguments:
        given = [*given, f"probe={probe}"]
    if "recipe" not in node.get("run", {}) and "data" in arguments and node:
        # with this machine's root of it, as in training
        defaults = [{"data": arguments["data"]}, {"optional local@data": arguments["data"]}, "_self_"]
        node = {"defaults": defaults} | node
        given = [a for a in given if a.partition("=")[0] not in (*OF_MODEL, "recipe", "task")]
    else:
        given = [a for a in given if a.partition("=")[0] not in (*choosable(), "recipe") or a.startswith("probe=")]
    node |= {"arguments": _recorded(given), "others": list(map(_recorded, others or []))}
    ConfigStore.instance().store("from_checkpoint", OmegaConf.create(node))
    return given


def _recorded(arguments: list[str]) -> list[str]:
    """Arguments as text of a configuration."""
    return [argument.replace("${", r"\${") for argument in arguments if not argument.startswith("hydra.")]


def _without_checkpoint(arguments: dict[str, str], probe: str) -> dict:
    """What a probe looks at that is not about trained weights: data, a model before its training, or neither."""
    wanted = set(probes.wants(probes.target(probe)))
    if wanted & set(probes.OF_A_CHECKPOINT):
        raise UserError("ckpt: no value; give one on the command line: ckpt=..." + _runs())
    return _composed(arguments) if wanted & {"data", "network"} else {}


def _runs() -> str:
    """Checkpoints that are near."""
    found = sorted(Path("outputs").glob("*/checkpoints"), key=lambda path: path.stat().st_mtime, reverse=True)
    return f"\nruns here: {', '.join(str(path.parent) for path in found[:5])}" if found else ""


def _evaluated(arguments: dict[str, str], probe: str | None) -> dict:
    """Model and data of an evaluation, as plain data with interpolations; None: of what is only looked at."""
    recipe = arguments.get("recipe")
    alone = is_weights(arguments["ckpt"])
    carried = config_of(arguments["ckpt"]) if alone and not {"recipe", "model"} & arguments.keys() else None
    if alone and carried is None:
        return _of_file(arguments)
    saved = _of_checkpoint(arguments, probe, carried)
    if recipe is None:
        return saved
    judged = _composed(arguments)
    if saved["run"]["model"] != judged["run"]["model"]:
        raise UserError(
            f"eval: the recipe {recipe} is for {judged['run']['model']}, the checkpoint holds {saved['run']['model']}; "
            "give the recipe that it was trained with"
        )
    return judged | {key: saved[key] for key in ("seed", "image_size", "attention", "model")}


def _of_file(arguments: dict[str, str]) -> dict:
    """A file of weights has no configuration: the command line must say what they are of, and the data."""
    if "recipe" in arguments or {"model", "data"} <= arguments.keys():
        return _composed(arguments)
    if "model" in arguments and "input" in arguments:  # images are prepared as those of ImageNet
        return _composed(arguments | {"data": "imagenet1k"})
    raise UserError(
        f"eval: {arguments['ckpt']} holds weights and no configuration; say of what: recipe=... or model=... data=..."
        "\n`python train.py list recipes` shows them"
    )


def _composed(arguments: dict[str, str]) -> dict:
    """What an evaluation takes from a recipe, or from a model and data that are named."""
    task = ("task",) if arguments.get("task") in options("task") else ()
    groups = [key for key in ("recipe", *OF_MODEL, "data", "augment", *task) if key in arguments]
    cfg, choices = compose_run([f"{key}={arguments[key]}" for key in groups])
    kept = ("seed", "image_size", "attention", *PLACES, "model", "augment", "data")
    node = {key: value for key, value in OmegaConf.to_container(cfg).items() if key in kept}
    _without_token_labels(node["data"])
    if "recipe" not in arguments:
        _as_the_weights_had_it(node["data"], arguments.get("ckpt"))
    node["run"] = {key: choices.get(key) for key in CHOICES}
    if "fit" in cfg.run:
        node["run"]["fit"] = cfg.run.fit
    node["run"]["task"] = _task_of(cfg.task)
    node |= _of_generation(OmegaConf.to_container(cfg)["task"])
    return _with_backend(node, "${backend}")


def _task_of(task: Mapping[str, Any]) -> str:
    """ "classification" of models.tasks.classification.Classification."""
    return str(task.get("_target_", "")).rpartition(".")[0].rpartition(".")[2]


def _of_generation(task: dict) -> dict:
    """The settings of a task that generates, which has samples to evaluate; nothing of any other."""
    return {"task": {key: task[key] for key in GENERATION}, "samples": None} if "sampling" in task else {}


def _as_the_weights_had_it(data: dict, ckpt: str | None) -> None:
    """Images are normalised as those that a file of weights was trained with, where that is known."""
    from models.checkpoints.normalisation import KEYS, for_channels, normalisation

    found = normalisation(ckpt) if ckpt is not None and KEYS[0] in data else None
    if found is not None and (fitting := for_channels(found, len(data[KEYS[0]]))) is not None:
        data |= dict(zip(KEYS, fitting, strict=True))


def _without_token_labels(data: dict) -> None:
    """Label maps are for training: an evaluation does not ask for them."""
    if "token_labels" in data:
        data["token_labels"] = None


def _with_backend(node: Any, backend: str) -> Any:
    """The configuration with what computes the attention replaced: it is no property of the trained weights."""
    if isinstance(node, list):
        return [_with_backend(part, backend) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: backend if key == "backend" else _with_backend(value, backend) for key, value in node.items()}


def _with_own_resources(data: dict) -> None:
    """Processes, patience and caches are those of the command line, or the usual ones, and no stranger's."""
    data["workers"] = "auto"
    data.pop("timeout", None)
    (data.get("source") or {}).pop("index", None)


def _split_of(ckpt: str) -> str | None:
    """The `split.csv` of the run that wrote a checkpoint: it is measured on the images that it was not trained on."""
    from models.checkpoints.format.directory import resolve

    path = resolve(ckpt).resolve().parents[1] / "split.csv"
    try:
        return str(inside(path.parent, path.name))
    except OSError:
        return None


def _has_validation(root: str) -> bool:
    """Whether a root has a folder for validation; where there is no such root, looking at the data says so."""
    try:
        return layout(root).val is not None
    except (ValueError, OSError):
        return True


def _lists(split: str | None, root: str) -> bool:
    """Whether the images for validation that a `split.csv` lists are below this root: then it is a copy of the data."""
    if split is None or not Path(split).is_file():
        return False
    with Path(split).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        names = [row.get("file") or "" for row in csv.DictReader(file) if row.get("split") == "val"]
    return bool(names) and all(Path(root, name).is_file() for name in names)


def _of_checkpoint(arguments: dict[str, str], probe: str | None, carried: dict | None = None) -> dict:
    """What evaluation takes from a checkpoint: model and data as they were, at the image size of the command line.

    `carried` is the configuration of exported weights, which have no task of their own where none was known.
    """
    from models.checkpoints import check_stored, read_config

    try:
        saved = read_config(arguments["ckpt"]) if carried is None else {"task": {}} | carried
        check_stored(saved, importing=False)  # and what it names before it is built (`models.runs.finished`)
        kept = {key: saved[key] for key in ("seed", "image_size", "attention", "model", "augment", "data")}
        kept |= _of_generation(saved["task"])
    except OSError as error:
        raise UserError(str(error)) from error
    except KeyError as error:
        raise UserError(
            f"eval: the configuration in {arguments['ckpt']} has no {error}; is it a run of ours?"
        ) from error
    try:
        return _settings_of(saved, kept, arguments, probe, carried)
    except (AttributeError, TypeError, LookupError) as error:  # a part of another kind than ours have it
        raise UserError(
            f"eval: the configuration in {arguments['ckpt']} cannot be used, got {type(error).__name__}: {error}; is "
            "it a run of ours?"
        ) from error


def _settings_of(saved: dict, kept: dict, arguments: dict[str, str], probe: str | None, carried: dict | None) -> dict:
    """What of a stored configuration an evaluation is offered, with the keys of the command line in their places."""
    from models.checkpoints.format.config import check_local
    from models.checkpoints.normalisation import KEYS

    run = {key: saved.get("run", {}).get(key) for key in ("model", "attention", "data")}
    run["task"] = _task_of(saved["task"]) or (saved.get("run") or {}).get("task")
    if fit := saved.get("run", {}).get("fit"):
        run["fit"] = fit
    for group in set(OF_MODEL) & set(arguments):
        raise UserError(
            f"eval: the checkpoint holds {run['model']} with {run['attention']} attention, this command asks "
            f"for {group}={arguments[group]}; leave {group}= out"
        )
    if probe is not None:
        refuse_useless(arguments, kept | {"run": run}, probe)
    kept = _with_backend(kept, "${backend}") | {"run": run}
    _without_token_labels(kept["data"])
    if "data" in arguments:
        run["data"] = arguments["data"]
        kept["data"] = {key: kept["data"][key] for key in KEYS if key in kept["data"]}
        return kept
    data, size = kept["data"], kept["image_size"]
    check_local(data, arguments.keys())
    _with_own_resources(data)
    for part in (data, data.get("eval", {})):
        for key in ("image_size", "size"):
            if part.get(key) == size:
                part[key] = "${image_size}"
    source = data.get("source", {})
    if "root" in data and source.get("root", "") == data["root"]:
        source["root"] = "${data.root}"
    if "split" in source:
        split = (_split_of(arguments["ckpt"]) if carried is None else None) or data.get("split")
        if "data.root" in arguments and carried is None and not _lists(split, arguments["data.root"]):
            # other images, of which none was trained on: all of them, or those for validation where these lie apart
            split, data["val_fraction"] = None, None if _has_validation(arguments["data.root"]) else 1
        data["split"], source["split"] = split, "${data.split}"
        if "val_fraction" in source:
            source["val_fraction"] = "${data.val_fraction}"
    return kept
