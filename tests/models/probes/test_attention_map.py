"""Where a point attends: weights on the whole map, pictures of them, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conf import looking
from conf.errors import UserError
from models import create_model
from models.attention import Grid, TokenWeights, mixers_of
from models.attention.recording import recorded
from models.probes.attention_map import row_of
from models.probes.drawing.overlays import overlay
from models.probes.reading.images import _told_apart
from models.probes.reading.layers import chosen_layers
from models.probes.reading.points import token_at


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return create_model("swin_32px", num_classes=5).eval()


def test_a_window_is_put_back_where_it_lies(swin):
    """The first block has whole windows of 7 on a map of 16: the point in the second sees nothing outside it."""
    with torch.no_grad(), recorded(swin) as calls:
        swin(torch.randn(2, 3, 32, 32))
    assert list(calls) == [name for name, _ in mixers_of(swin)]
    mixer = dict(mixers_of(swin))["stages.0.blocks.0.attn"]
    row = row_of(mixer, calls["stages.0.blocks.0.attn"], (0.5, 0.1))
    assert row.weights.shape == (2, 2, 16, 16) and not row.on_prefix.any()
    torch.testing.assert_close(row.weights.sum((2, 3)), torch.ones(2, 2))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[:7, 7:14] = True
    assert (row.weights[..., inside] > 0).all() and (row.weights[..., ~inside] == 0).all()


def test_shortened_keys_cover_their_tokens():
    weights = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]]]])
    found = TokenWeights(weights, Grid(4, 6), Grid(2, 2)).on_tokens().view(4, 6)
    torch.testing.assert_close(found[:2, :3], torch.full((2, 3), 0.1 / 6))
    torch.testing.assert_close(found[2:, 3:], torch.full((2, 3), 0.4 / 6))
    uneven = TokenWeights(weights, Grid(3, 3), Grid(2, 2)).on_tokens()
    torch.testing.assert_close(uneven.sum(), torch.tensor(1.0))


def test_names_of_pictures_are_told_apart():
    names = ["a/cat.jpg", "b/cat.png", "my dog.webp", "deletion.png", "7"]
    assert _told_apart(names) == ["cat", "cat-1", "my_dog", "deletion-3", "7"]


def test_the_token_at_a_point():
    assert token_at(None, Grid(4, 4, 2)) == 0
    assert token_at(None, Grid(4, 4)) == 10
    assert token_at((1.0, 0.0), Grid(2, 3, 1)) == 3
    assert looking.point([0, 1]) == (0.0, 1.0) and looking.point(None) is None


def test_heat_lies_where_the_weights_are():
    weights = torch.zeros(4, 4)
    weights[0, 3] = 2.0
    drawn = overlay(Image.new("RGB", (32, 32), "gray"), weights)
    assert drawn.size == (224, 224) and drawn.getpixel((10, 200)) == (128, 128, 128)
    red, _, blue = drawn.getpixel((200, 10))
    assert red > blue + 30


@pytest.mark.parametrize("point", [[0.5], [0.2, 1.5], "middle", [0.1, None]])
def test_a_point_outside(point):
    with pytest.raises(UserError, match="point must be two fractions from 0 to 1"):
        looking.point(point)


def test_layers_by_number_and_name(swin):
    names = [name for name, _ in mixers_of(swin)]
    assert list(chosen_layers("x", swin, "all")) == names
    assert list(chosen_layers("x", swin, -1)) == names[-1:]
    assert list(chosen_layers("x", swin, [names[3], 0])) == [names[0], names[3]]
    with pytest.raises(
        UserError, match=r"x: there is no layer 'stages.0.blocks.0.att'.*did you mean.*set probe.layers"
    ):
        chosen_layers("x", swin, "stages.0.blocks.0.att")
    with pytest.raises(UserError, match="there is no layer 8"):
        chosen_layers("x", swin, 8)
    with pytest.raises(UserError, match="no layer has an attention matrix, got DepthwiseConv"):
        chosen_layers("x", create_model("vit_32px", "conv", num_classes=5), "all")
    why = "since the channels of a group attend to one another, not tokens"
    with pytest.raises(
        UserError, match=rf"x: .*attn \(ChannelCore\) has no attention matrix, {why}; choose of stages.0"
    ):
        chosen_layers("x", create_model("davit_32px", num_classes=5), 1)


@pytest.mark.full
def test_from_the_command_line(command, tmp_path):
    """A report of the user's picture and of images of validation, without another file."""
    save_file(create_model("swin_32px", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "set.png")
    given = ("eval", "ckpt=w.safetensors", "model=swin_32px", "data=digits", "probe=attention_map", "probe.layers=0")
    status, out, err = command(*given, "input=set.png", "probe.point=[0.3,0.3]", "probe.heads=1")
    assert status == 0, err
    assert "where the point 0.30 from the left, 0.30 from the top attends, in 1 layers of 1 images" in out
    folder = tmp_path / "evaluation" / "set-32-w-attention_map"
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 1 and "data:image/png;base64," in page and "http" not in page
    assert sorted(path.name for path in folder.iterdir()) == ["layers.csv", "report.html", "set.png"]
    figures = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    assert 0 < figures["stages.0.blocks.0.attn/entropy"] <= 3.9
    for wrong, text in (("probe.heads=2", "heads=2 is none of the 2 heads"), ("probe.max_tokens=9", "has 256 tokens")):
        status, _, err = command(*given, wrong)
        assert status == 2 and text in err, err
