"""Measure a finished model, predict with it, or look at data and machine: figures, tables, charts, pages.

$ python eval.py ckpt=outputs/mine
$ python eval.py ckpt=outputs/mine input=photos/new
$ python eval.py recipe=biformer/tiny_in1k data.root=/data/imagenet ckpt=biformer_tiny_best.pth
$ python eval.py probe=check_data data=imagefolder data.root=photos
$ python eval.py doctor
"""

from conf import apart, cli  # isort: skip  (first: it refuses a Python that is too old)
from models.runs import evaluated


def job():
    """What is run, imported when it is: `--help` does not wait for torch."""
    apart.load_timm()
    from models.runs.evaluation import evaluate

    return evaluate


if __name__ == "__main__":
    cli.run("eval", job, before=evaluated.take_config)
