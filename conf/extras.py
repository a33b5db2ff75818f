"""What one option needs beyond requirements.txt: a package that is not installed is said before any work."""

from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

REQUIREMENTS = Path(__file__).parents[1] / "requirements-extra.txt"
# the setting, the value that needs the package (None: any), and the package
NEEDS = (
    ("logger", "tensorboard", "tensorboard"),
    ("task.autoencoder", None, "diffusers"),
    ("probe", "gradcam", "captum"),
    ("probe", "integrated_gradients", "captum"),
)


def missing(cfg: DictConfig) -> list[str]:
    """One sentence per package that these settings need and that is not installed."""
    sentences = []
    for key, needing, package in NEEDS:
        value = _chosen(cfg, key)
        if value is not None and needing in (None, value) and find_spec(package) is None:
            sentences.append(sentence(f"{key}={value}", package))
    return sentences


def sentence(setting: str, package: str) -> str:
    """What is said of a package that is not installed."""
    return (
        f"{setting} needs the package {package}, which is not installed; "
        f"run: python -m pip install '{requirement(package)}'"
    )


def _chosen(cfg: DictConfig, key: str) -> str | None:
    """The value of a setting, of a group its name or that of its function."""
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, DictConfig):
        return value
    return value.get("name") or str(value.get("_target_")).rpartition(".")[2]


def requirement(package: str) -> str:
    """The line of requirements-extra.txt, such as `tensorboard>=2.16,<3`."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return next(line for line in lines if line.startswith(package))
