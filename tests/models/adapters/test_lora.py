"""LoRA: what it computes, what it trains, plain weights again, and its small file."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import create_model
from models.adapters import load_adapter
from models.adapters.lora import LowRank, lora
from models.reparam import adopt, fold

IMAGES = torch.zeros(2, 3, 32, 32)


def vit(**options):
    torch.manual_seed(0)
    return create_model("vit_32px", "softmax", num_classes=5, depth=4, dim=32, **options).eval()


def adapted(**options):
    made = vit()
    lora(made, **options)
    return made


def test_it_is_the_papers_formula():
    layer = nn.Linear(6, 4)
    adapter = LowRank(layer.weight, rank=2, alpha=6.0, dropout=0.0)
    assert torch.equal(adapter(layer.weight), layer.weight)
    nn.init.normal_(adapter.up)
    torch.testing.assert_close(adapter(layer.weight), layer.weight + 3 * adapter.up @ adapter.down)
    x = torch.randn(5, 6)
    torch.testing.assert_close(
        nn.functional.linear(x, adapter(layer.weight)), x @ layer.weight.T + 3 * x @ adapter.down.T @ adapter.up.T
    )


def test_it_starts_as_the_model_and_trains_little():
    plain, model = vit(), adapted(rank=2)
    assert torch.equal(model(IMAGES), plain(IMAGES))
    model.train()(IMAGES).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if not name.startswith("head.")} == {"up", "down"}
    assert sum("up" in name for name in trained) == 4 * 4  # qkv, proj, fc1 and fc2 of four blocks


def test_targets_convolutions_and_what_is_trained_besides():
    model = adapted(targets=["attn.qkv", "patch_embed.proj"], also=["*norm1*", "norm.bias"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert "stem.patch_embed.proj.parametrizations.weight.0.up" in trained and "norm.bias" in trained
    assert not any("attn.proj" in name or "fc1" in name or name == "norm.weight" for name in trained)
    assert sum("norm1" in name for name in trained) == 8


def test_dropout_leaves_out_components_in_training_only():
    adapter = LowRank(torch.zeros(8, 8), rank=8, alpha=8.0, dropout=0.5)
    with torch.no_grad():
        adapter.up.copy_(torch.eye(8)), adapter.down.copy_(torch.eye(8))
    kept = adapter(torch.zeros(8, 8)).diagonal()
    assert set(kept.tolist()) == {0.0, 2.0}
    assert torch.equal(adapter.eval()(torch.zeros(8, 8)), torch.eye(8))


def test_folded_and_adopted():
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    logits = model(IMAGES)
    fold(model)
    torch.testing.assert_close(model(IMAGES), logits)
    again = adapted()
    adopt(again, model.state_dict())
    torch.testing.assert_close(again(IMAGES), logits)


def test_its_file_goes_with_the_weights_it_was_trained_beside(tmp_path):
    model, other = adapted(), adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_file(trained, tmp_path / "adapter.safetensors")
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(other(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match="load_adapter: the file must hold what the adapter of the model trains, got"):
        load_adapter(adapted(rank=4), tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "lora: rank must be a whole number of at least 1, got 0; set adapter.rank"),
        ({"alpha": -1}, "lora: alpha must be a number of at least 1e-06, got -1; set adapter.alpha"),
        ({"dropout": 1}, "lora: dropout must be a share from 0, below 1, got 1; set adapter.dropout"),
        ({"targets": "qkv"}, "lora: targets must be a list of names, got 'qkv'; set adapter.targets="),
        ({"targets": ["kvq"]}, "lora: targets must be ends of names of linear layers or convolutions, got kvq, of w"),
        ({"also": ["*gain"]}, "lora: also must be names or globs of parameters, got '*gain', which none has; set ad"),
    ],
)
def test_what_cannot_be_is_refused(options, text):
    with pytest.raises(ValueError) as error:
        adapted(**options)
    assert str(error.value).startswith(text)


def test_a_model_without_linear_layers_says_what_to_name():
    with pytest.raises(
        ValueError, match=r"got any linear layer, of which there is none; set adapter\.targets, of conv"
    ):
        lora(nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1), "head": nn.Linear(4, 2)}))
