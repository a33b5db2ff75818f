"""Train one configuration.

$ python train.py model=swin_tiny attention=agent data=imagenet1k data.root=/data/imagenet
$ python train.py recipe=biformer/tiny_in1k data.root=/data/imagenet trainer.devices=8
$ python train.py --help
"""

from conf import cli  # isort: skip  (first: it refuses a Python that is too old)
from omegaconf import DictConfig


def main(cfg: DictConfig) -> float | None:
    """Returns the best monitored value, for sweeps."""
    from models.runs.training import train

    return train(cfg)


if __name__ == "__main__":
    cli.run("train", main)
