"""Attention flow: the maximum flow through the layers."""

import pytest
import torch

from models import create_model
from models.probes.flow import flow_map, flows
from models.probes.reading.paths import followed
from models.probes.rollout import called, rollout_maps, with_residual

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"dim": 32, "num_heads": 2, "num_classes": 5, "patch_size": 8}


@pytest.mark.parametrize("chosen", [{"class_token": True}, {"class_token": False}], ids=str)
def test_through_one_layer_flow_is_rollout_of_a_token(chosen):
    model = create_model("vit_32px", **SMALL | chosen, depth=1).eval()
    layers = followed("flow", model, "last")
    (name,) = layers
    matrix = with_residual(layers[name], name, called(model, IMAGE, layers)[name], "mean", 0.0)[0]
    reads = torch.zeros(len(matrix))
    reads[0] = 1
    torch.testing.assert_close(flows(matrix[None], reads), matrix[0])
    if chosen["class_token"]:
        torch.testing.assert_close(flow_map(model, IMAGE, layers), rollout_maps(model, IMAGE, layers).map_BYX)


def test_a_narrow_layer_limits_the_flow_and_no_flow_is_above_one():
    wide, narrow = torch.full((2, 2), 0.5), torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    reads = torch.tensor([1.0, 0.0])
    assert flows(torch.stack([wide, wide]), reads).tolist() == pytest.approx([1.0, 1.0])
    assert flows(torch.stack([narrow, wide]), reads).tolist() == pytest.approx([1.0, 0.2])
    assert flows(torch.stack([wide, narrow]), reads).tolist() == pytest.approx([0.6, 0.6])
    generator = torch.Generator().manual_seed(0)
    matrices = torch.rand(3, 5, 5, generator=generator).softmax(-1)
    found = flows(matrices, torch.full((5,), 0.2))
    assert (found <= 1 + 1e-6).all() and (found >= 0.5).all()  # more than rollout, whose shares sum to one


def test_the_map_of_several_layers_sums_to_one():
    model = create_model("vit_32px", **SMALL, depth=2, class_token=False).eval()
    found = flow_map(model, IMAGE, followed("flow", model, "last"))
    assert found.shape == (1, 4, 4) and found.sum().item() == pytest.approx(1.0, abs=1e-5)
