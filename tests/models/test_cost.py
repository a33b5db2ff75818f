"""Multiply-adds do not depend on where a model is, and counting them changes nothing."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from models import create_model
from models.cost import multiply_adds
from models.tables import cost_of


@pytest.mark.parametrize("name", ["vit_32px", "swin_32px"])
def test_a_model_in_memory_costs_what_the_table_says(name):
    """Attention included, which torch's counter leaves out on a CPU."""
    assert multiply_adds(create_model(name), (32, 32)) == cost_of(name).multiply_adds


def test_counting_leaves_the_model_and_random_numbers_alone():
    model = create_model("vit_32px", attention="agent", num_classes=3).train()
    before, drawn = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    assert multiply_adds(model, (32, 32)) > 0
    assert torch.equal(torch.get_rng_state(), drawn) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


class NeedsNumbers(torch.nn.Conv2d):
    """A model that looks at its numbers, which a copy without memory has not."""

    def forward(self, x):
        x = super().forward(x if bool(x.sum() > -1e9) else -x).flatten(2)[:, None]
        return scaled_dot_product_attention(x, x, x)


def test_what_needs_numbers_is_counted_with_them():
    model, drawn = NeedsNumbers(3, 4, 1).train(), torch.get_rng_state()
    convolution, attention = 3 * 4 * 64, 2 * 4 * 4 * 64  # 4 tokens of 64 channels
    assert multiply_adds(model, (8, 8)) == convolution + attention
    assert model.training and torch.equal(torch.get_rng_state(), drawn)
