"""Train one configuration.

$ python train.py model=swin_tiny attention=agent data=imagenet1k data.root=/data/imagenet
$ python train.py recipe=biformer/tiny_in1k data.root=/data/imagenet trainer.devices=8
$ python train.py --help
$ python train.py list models=swin
"""

from conf import apart, cli  # isort: skip  (first: it refuses a Python that is too old)
from models.runs import early, launchers


def job():
    """What is run, imported when it is: `--help` does not wait for torch."""
    if launchers.sends_away():
        from models.runs.launchers.slurm import send

        return send
    apart.load_timm()
    from models.runs.training import train

    return train


def listed(arguments: list[str]) -> None:
    """What can be chosen, as tables."""
    from models.listing import show

    show(arguments)


if __name__ == "__main__":
    launchers.register()
    cli.run("train", job, before=early.find_weights, words={"list": listed})
