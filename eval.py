"""Evaluate a checkpoint: top-1, top-5, loss, parameters, FLOPs, images per second.

$ python eval.py ckpt=outputs/mine/checkpoints/best
$ python eval.py ckpt=outputs/mine/checkpoints/best data.root=/other/copy/of/the/images data.batch_size=256
$ python eval.py recipe=biformer/tiny_in1k data.root=/data/imagenet ckpt=biformer_tiny_best.pth
"""

from conf import cli  # isort: skip  (first: it refuses a Python that is too old)
from models.runs import evaluated


def job():
    """What is run, imported when it is: `--help` does not wait for torch."""
    from models.runs.evaluation import evaluate

    return evaluate


if __name__ == "__main__":
    cli.run("eval", job, before=evaluated.take_config)
