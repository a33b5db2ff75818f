"""The model card of a folder for Hugging Face's hub: what it is, its figures, how it was trained, how to load it."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from conf import recipes
from models.cost import parameters
from models.export.subject import Subject

TASKS = {"classification": "image-classification", "multilabel": "image-classification"}
NAMES = {"top1": "top-1", "top5": "top-5", "loss": "loss", "f1_macro": "F1, mean of classes", "map": "mAP"}


def card(subject: Subject, config: dict[str, Any], figures: dict[str, Any], name: str) -> str:
    """Text in Markdown, with the block that the hub reads in front."""
    run = config["run"]
    sections = [f"---\n{_data(subject, config, figures, name)}\n---", f"# {name}", _what(subject, config)]
    if table := _figures(subject, figures):
        sections += ["## Figures", table]
    sections += ["## Training", _training(config), "## Use", _use(run["model"], name), "## Labels", _labels(subject)]
    return "\n\n".join(sections) + "\n"


def _data(subject: Subject, config: dict[str, Any], figures: dict[str, Any], name: str) -> ModelCardData:
    run = config["run"]
    task = TASKS.get(run.get("task") or "classification", "unconditional-image-generation")
    top1 = figures.get(f"val/top1{_suffix(subject)}")
    result = EvalResult(task, run["data"], run["data"], "accuracy", top1) if top1 is not None else None
    return ModelCardData(
        library_name="pytorch",
        pipeline_tag=task,
        tags=[task, "vision", "attention", run["model"], *([run["attention"]] if run.get("attention") else [])],
        **({"model_name": name, "eval_results": [result]} if result else {}),
    )


def _what(subject: Subject, config: dict[str, Any]) -> str:
    height, width = subject.size
    return (
        f"{subject.title}: {parameters(subject.model) / 1e6:.2f} M parameters, {len(subject.classes)} classes, "
        f"images of {height} × {width} pixels, {'averaged (EMA)' if subject.chosen == 'ema' else 'raw'} weights. "
        "Made with the vision attention zoo, whose names the weights have."
    )


def _suffix(subject: Subject) -> str:
    return "_ema" if subject.chosen == "ema" else ""


def _figures(subject: Subject, figures: dict[str, Any]) -> str:
    """Of these weights, on the validation data, when the checkpoint was written."""
    rows = [(label, figures.get(f"val/{key}{_suffix(subject)}")) for key, label in NAMES.items()]
    shown = [(label, f"{v:.4f}" if label == "loss" else f"{v:.2%}") for label, v in rows if v is not None]
    if not shown:
        return ""
    return "\n".join(
        ["| on the validation data | |", "|---|--:|", *(f"| {label} | {value} |" for label, value in shown)]
    )


def _training(config: dict[str, Any]) -> str:
    recipe = config["run"].get("recipe")
    told = [f"- data: {config['run']['data']}"]
    if recipe:
        target = recipes.load(recipe).get("target") or {}
        told.append(f"- recipe: `{recipe}`" + (f", {target['paper']}" if target.get("paper") else ""))
    for group, keys in (("optimizer", ("opt", "lr", "weight_decay")), ("schedule", ("sched", "warmup_epochs"))):
        values = {key: (config.get(group) or {}).get(key) for key in keys}
        if any(value is not None for value in values.values()):
            told.append(
                f"- {group}: {', '.join(f'{key} {value}' for key, value in values.items() if value is not None)}"
            )
    return "\n".join([*told, "- every setting: `config.json`"])


def _use(model: str, name: str) -> str:
    return f"""In a checkout of the vision attention zoo:

```console
$ python eval.py ckpt={name} input=path/to/images
$ python train.py init={name} model={model} recipe=finetune data=imagefolder data.root=path/to/images
```

```python
from models.checkpoints import create_from

model = create_from("{name}").eval()
```

From the hub write `hf-hub:<owner>/{name}` in place of `{name}`.
Images are prepared as `preprocessor_config.json` says."""


def _labels(subject: Subject) -> str:
    shown = ", ".join(f"{label}: {name}" for label, name in enumerate(subject.classes[:20]))
    more = len(subject.classes) - 20
    return f"{shown} … and {more} more in `labels.json`" if more > 0 else shown
