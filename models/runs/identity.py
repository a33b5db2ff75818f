"""Whether a run and its continuation are the same run: every setting is compared but those that may change.

A continued run sees what the command says, not what the checkpoint was trained with. So each setting that the two have
otherwise is an error, and not a new run in the old one's name. What may change stands in `FREE`; a setting that is not
named there is compared, also one that is added to conf/ later. Of a setting that the checkpoint does not know, because
it is older, its usual value is no difference.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.compose import compose
from conf.errors import UserError
from conf.names import PLACES, choosable
from data.changes import NAME, check_same, read_names

# What may be otherwise, with all that is below it
FREE = frozenset(
    (
        # names, places and what is recorded
        *("run", "recipe", "target", "fine_tunes", "fit", "debug", "local", "logger", "resume", "init", "threads"),
        *("data.root", "data.source.root", "data.source.path", "data.source.data_dir", "data.source.data_files"),
        *("data.source.cache_dir", "data.source.index", "data.source.download", "data.token_labels"),
        *(f"trainer.{name}" for name in ("_target_", "log_every_n_steps", "logger", "profiler", "default_root_dir")),
        *("callbacks.watch", "callbacks.profile", "callbacks.anomaly"),
        # how long, and when it is saved and validated
        *(f"trainer.{name}" for name in ("max_epochs", "max_steps", "max_time", "check_val_every_n_epoch")),
        *("callbacks.checkpoints", "callbacks.preemption", "task.sample_every_n_epochs"),
        # on what, and how it is read and computed
        *(f"trainer.{name}" for name in ("accelerator", "devices", "strategy", "num_nodes", "timeout", "static_graph")),
        *(f"trainer.{name}" for name in ("deterministic", "benchmark", "plugins", "use_distributed_sampler")),
        *("task.compile", "task.gradient_checkpointing", "data.workers", "data.timeout"),
        *("task.autoencoder", "task.teacher_weights", "task.sampling", "task.score", "task.seed"),
        "task.match.original",
        # what is done where something fails
        *("data.on_error", "data.max_skipped", "callbacks.non_finite", "callbacks.spikes"),
        # judged elsewhere: images per step (`models.tasks.effective_batch`), the data and its split
        *("global_batch", "data.batch_size", "trainer.accumulate_grad_batches"),
        *("classes", "data.split", "data.source.split", "data.source.val_labels"),
        # copies of other settings
        *("model.attention", "model.image_size", "data.image_size", "data.eval.size", "data.num_classes", "data.seed"),
        *("data.source.seed", "data.augment", "task.model", "task.optimizer", "task.schedule", "task.num_classes"),
    )
)
OF_CHECKPOINT = ("monitor", "mode")  # are compared, the rest of `checkpoint` is free
KNOWN_BY_CONTENT = ("data.classes", "data.source.classes", "data.source.train", "data.source.val")
COUNTS_OR_SHARES = ("limit_train_batches", "limit_val_batches", "overfit_batches")  # 1 is a batch, 1.0 all of them


class Difference(NamedTuple):
    """A setting by its full key, and its two values; what is missing is `None`."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        if self.key.endswith("._target_"):
            was, now = (str(value).rpartition(".")[2] for value in (self.was, self.now))
            return f"{self.key.removesuffix('._target_')} {was} and not {now}"
        return f"{self.key} {_describe(self.was, self.now)} and not {_describe(self.now, self.was)}"


def compare_configs(
    saved: dict[str, Any],
    current: dict[str, Any],
    usual: Callable[[str], bool] = lambda key: False,
    fingerprinted: bool = False,
) -> None:
    """Compares everything that a continued run must have in common with its checkpoint.

    What computes the attention (`backend`) is free: it changes the result by rounding only.

    Args:
        saved: the configuration in the checkpoint.
        current: the resolved configuration of this command.
        usual: whether a setting, by its full key, has the value that it has where nobody says anything; asked for those
            that the checkpoint does not know.
        fingerprinted: the checkpoint knows its data by their content, so that lists and shards may lie elsewhere.

    Raises:
        ValueError: one sentence that names every difference, with both values.
    """
    free = FREE | set(KNOWN_BY_CONTENT) if fingerprinted else FREE
    saved, current = (_own(without_backend(config)) for config in (saved, current))
    found = [
        str(difference)
        for section in saved
        if section in current
        for difference in _different(saved[section], current[section], section, free, usual)
    ]
    if found:
        raise UserError(
            f"resume: the checkpoint was trained with {', '.join(found)} as this command asks; "
            "give the same options, or start a new run with another run.name"
        )


def compare_data(saved: dict[str, Any], position: dict[str, Any], data: Any, run_dir: Path) -> None:
    """Compares the data of a run with that of its checkpoint.

    Args:
        saved: the configuration in the checkpoint; of an older one the names of classes are all that is known.
        position: what the data module has left in the checkpoint.
        data: of this command.
        run_dir: of the checkpoint; it may hold the names of files.

    Raises:
        ValueError: one sentence that says what has changed.
    """
    before = position.get("data")
    if before is not None and before != data.fingerprint:
        check_same(before, data.fingerprint, read_names(run_dir / NAME, train=data.source.train, val=data.source.val))
    classes = saved.get("classes")
    if before is None and classes is not None and list(classes) != data.class_names:
        check_same(*({"classes": names, "train": None} for names in (list(classes), data.class_names)))


def differences(saved: dict[str, Any], current: dict[str, Any], sections: Iterable[str]) -> list[str]:
    """Every setting of some sections that two configurations have otherwise: "x and not y"."""
    saved, current = (without_backend(config) for config in (saved, current))
    return [
        str(difference)
        for section in sections
        if saved.get(section) and current.get(section)
        for difference in _different(saved[section], current[section], section, FREE, lambda key: False)
    ]


def without_backend(node: Any) -> Any:
    """A configuration without what computes its attention."""
    if isinstance(node, list):
        return [without_backend(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: without_backend(value) for key, value in node.items() if key != "backend"}


def usual_settings(cfg: DictConfig) -> Callable[[str], bool]:
    """Whether a setting of the running command has the value that conf/ gives it with the same choices.

    Args:
        cfg: as composed, not resolved.
    """

    @cache
    def written() -> tuple[DictConfig, DictConfig]:
        chosen, groups = HydraConfig.get().runtime.choices, choosable()
        given = [f"{group}={name}" for group, name in chosen.items() if group in groups and name is not None]
        plain = compose("train", [one for one in given if not one.startswith(("debug=", "recipe="))])
        return tuple(OmegaConf.to_container(config) for config in (cfg, plain))

    def is_usual(key: str) -> bool:
        now, usual = written()
        for name in key.split("."):
            if not (isinstance(usual, dict) and isinstance(now, dict) and name in usual and name in now):
                return False
            now, usual = now[name], usual[name]
        return now == usual

    return is_usual


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """Without the places that the model repeats, and of `checkpoint` only what is compared."""
    model = config.get("model")
    repeated = [place for place in PLACES if isinstance(model, dict) and place in model]
    kept = {key: value for key, value in config.items() if key not in repeated}
    if isinstance(saving := kept.get("checkpoint"), dict):
        kept["checkpoint"] = {key: value for key, value in saving.items() if key in OF_CHECKPOINT}
    return kept


def _different(was: Any, now: Any, key: str, free: Iterable[str], usual: Callable[[str], bool]) -> Iterator[Difference]:
    """The settings at and below a key that are not the same; lists, and the attention, count as one."""
    if key in free:
        return
    if key == "attention":
        if was != now and None not in (was, now):
            yield Difference(key, was, now)
    elif _is_group(was, now) or _is_group(now, was):
        yield from _different(was or dict.fromkeys(now), now or dict.fromkeys(was), key, free, usual)
    elif not (isinstance(was, dict) and isinstance(now, dict)):
        if not _same(was, now, key):
            yield Difference(key, was, now)
    elif None not in (kinds := (was.get("_target_"), now.get("_target_"))) and kinds[0] != kinds[1]:
        yield Difference(f"{key}._target_", *kinds)
    else:
        for name in {**was, **now}:
            below = f"{key}.{name}"
            if name in was or below in free or not usual(below):
                yield from _different(was.get(name), now.get(name), below, free, usual)


def _is_group(one: Any, other: Any) -> bool:
    """Whether the one holds several settings, none of which the other has."""
    return isinstance(one, dict) and bool(one) and "_target_" not in one and other is None


def _same(was: Any, now: Any, key: str) -> bool:
    if key == "trainer.precision":
        return _precision(was) == _precision(now)
    if key.rpartition(".")[2] in COUNTS_OR_SHARES and type(was) is not type(now):
        return False
    return was == now


def _precision(value: Any) -> str:
    """Lightning's names for the same: 32 and "32-true", "bf16" and "bf16-mixed"."""
    return {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(str(value), str(value))


def _describe(value: Any, other: Any) -> str:
    """A value in words; of a configured part its name and the options in which it differs from the other."""
    if isinstance(value, list):
        others = other if isinstance(other, list) else []
        return " / ".join(_describe(part, base) for part, base in zip_longest(value, others[: len(value)]))
    if not isinstance(value, dict):
        return str(value)
    name = str(value.get("_target_")).rpartition(".")[2]
    same = isinstance(other, dict) and other.get("_target_") == value.get("_target_")
    changed = {key: item for key, item in value.items() if same and (key not in other or other[key] != item)}
    options = [
        f"{key}={_describe(item, other.get(key)) if isinstance(item, dict) else item}" for key, item in changed.items()
    ]
    return f"{name}({', '.join(options)})" if options else name
