"""σReparam equals the authors' code: linear layers and convolutions, a step of the power iteration, a whole model."""

from functools import partial

import parity
import pytest
import reference
import torch
from torch import nn

from models.attention.softmax import softmax_attention
from models.backbones.vit import ViT
from models.checkpoints.names import vit
from models.reparam import fold
from models.reparam.sigma import sigma

MARK = ".parametrizations.weight."
PARTS = {"original": "weight", "0.sigma": "sigma", "0.u": "spectral_normed_weight.u"}


def plain(name: str) -> nn.Module:
    hparams = reference.info(name)["hparams"]
    if "kernel_size" in hparams:
        sizes = (hparams["in_channels"], hparams["out_channels"], hparams["kernel_size"])
        return nn.Conv2d(*sizes, stride=hparams["stride"])
    return nn.Linear(hparams["in_features"], hparams["out_features"], bias=hparams.get("bias", True))


def converted(module: nn.Module, state: dict, theirs=lambda base: base) -> dict:
    """Their weights by our names; they store convolutions flattened."""
    ours = {}
    for key, value in module.state_dict().items():
        base, mark, part = f".{key}".rpartition(MARK)
        prefix = theirs(base.removeprefix(".")) if base else ""
        name = prefix + PARTS[part] if mark else theirs(key)
        ours[key] = state[name].reshape(value.shape)
    return ours


@pytest.mark.parametrize("name", [n for n in reference.cases("module") if n.startswith("sigma_reparam/")])
def test_a_layer(name):
    module = plain(name)
    if not reference.info(name)["hparams"].get("stats_only"):
        sigma(module)
    parity.check(name, module, partial(converted, module), lambda layer, x: layer(x))


def test_a_step_in_training_keeps_u():
    name = "sigma_reparam/sn_linear__24x40_train"
    module = plain(name)
    sigma(module)
    module.load_state_dict(converted(module, reference.weights(name)))
    assert reference.compare(name, "output", module.train()(reference.model_input(name))) <= parity.OUTPUT
    kept = module.parametrizations.weight[0]
    assert reference.compare(name, "u_after", kept.u) <= parity.OUTPUT
    norm = kept.v @ module.weight @ kept.u  # theirs is that of the weight as it is used
    assert reference.compare(name, "spectral_norm_after", norm) <= parity.OUTPUT


def test_a_vision_transformer_without_norms():
    name = "sigma_reparam/sigma_vit__d96_depth3_64"
    sizes = {"patch_size": 16, "dim": 96, "depth": 3, "num_heads": 3}
    model = ViT(softmax_attention, 64, 10, reparam=partial(sigma, norms="removed"), **sizes)
    keys = [key.replace(MARK + "original", ".weight") for key in model.state_dict()]
    names = vit.LAYOUTS[0].names(key for key in keys if MARK not in key)

    def theirs(base: str) -> str:
        return names[base][0].name if base in names else names[f"{base}.weight"][0].name.removesuffix("weight")

    parity.check(name, model, partial(converted, model, theirs=theirs), lambda vit, x: vit(x))
    fold(model)
    assert not any("parametrizations" in key for key in model.state_dict())
    assert torch.isfinite(model(reference.model_input(name))).all()
