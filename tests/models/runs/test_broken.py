"""Weights that are not finite are neither evaluated nor trained from."""

import math

import pytest
import torch
from torch import nn

from conf.errors import UserError
from models.runs.broken import refuse_broken
from tests.faults.programs import TINY, run

pytestmark = pytest.mark.case(44)


def test_the_tensor_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.full((2,), -math.inf))
    refuse_broken(model, "eval: the weights of a")
    model[1].running_var[0] = math.inf
    with pytest.raises(UserError, match=r"the weights of a must be finite, got NaN or infinity in 1\.running_var"):
        refuse_broken(model, "eval: the weights of a")
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"in 0\.weight and 1 more of 6 tensors"):
        refuse_broken(model, "eval: the weights of a")


@pytest.mark.full
def test_no_figures_and_no_training_from_such_weights(tmp_path):
    assert run(tmp_path, "run.name=a", *TINY, "trainer.max_epochs=1")[0] == 0
    load = "from safetensors.torch import load_file, save_file\np = 'outputs/a/checkpoints/last/model.safetensors'\n"
    load += "w = load_file(p); w['norm.weight'][0] = float('nan'); save_file(w, 'bad.safetensors')\n"
    model = [setting for setting in TINY if setting.startswith(("model", "data"))]
    status, text = run(tmp_path, "ckpt=bad.safetensors", *model, program="eval.py", before=load)
    assert status == 2 and "NaN or infinity in norm.weight" in " ".join(text.split()), text
    status, text = run(tmp_path, "init=bad.safetensors", "run.name=b", *TINY)
    assert status == 2 and "init: the weights of bad.safetensors must be finite" in " ".join(text.split()), text
