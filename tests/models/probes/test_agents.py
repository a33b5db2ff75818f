"""What agents gather and who reads them: together it is the attention of the model."""

import pytest
import pytorch_lightning as pl
import torch

from conf.errors import UserError
from conf.names import options
from data.module import ImageData
from data.sources.digits import Digits
from models import create_model
from models.attention import mixers_of, to_moh
from models.attention.recording import recorded
from models.probes.agents import agents, agents_of, summed

VIT = {"num_classes": 10, "depth": 1, "dim": 32, "attention": "agent"}


@pytest.fixture(scope="module")
def given():
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return ImageData(Digits(), 10, 32, 8, workers=0), trainer


def model_of(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "given",
    [{"class_token": True}, {"window": 4}, {"sr_ratio": 2}],
)
def test_reading_what_was_gathered_is_the_attention(given):
    model, images = model_of("vit_32px", **VIT, **given), torch.randn(2, 3, 32, 32)
    mixers = dict(mixers_of(model))
    found = agents_of(model, mixers, images)
    assert found.keys() == mixers.keys() and len(found) == 1
    with torch.no_grad(), recorded(model) as calls:
        model(images)
        ((layer, mixer),) = mixers.items()
        weights = mixer.token_weights(*calls[layer]).weights
    one = found[layer]
    through = one.read @ one.gathered.mT
    seen = weights != 0
    torch.testing.assert_close(through[seen], weights[seen], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.read.sum(-1), torch.ones(one.read.shape[:3]))
    assert one.whole == ("window" not in given) and seen.all() == one.whole
    windows = 1 if one.whole else 4
    torch.testing.assert_close(one.gathered.sum(2), torch.full((2, 4, one.read.shape[-1]), float(windows)))
    assert summed(one)["smallest_load"] <= 1 / one.read.shape[-1] <= summed(one)["largest_load"]


def test_agents_in_stripes_of_two_directions():
    model, images = model_of("vit_32px", **VIT, stripe=2), torch.randn(2, 3, 32, 32)
    ((layer, mixer),) = mixers_of(model)
    found = agents_of(model, {layer: mixer}, images)
    assert list(found) == [f"{layer}.vertical", f"{layer}.horizontal"]
    with torch.no_grad(), recorded(model) as calls:
        model(images)
        weights = mixer.token_weights(*calls[layer]).weights
    through = torch.cat([one.read @ one.gathered.mT for one in found.values()], dim=1)
    torch.testing.assert_close(through[weights != 0], weights[weights != 0], rtol=1e-4, atol=1e-5)
    upright, flat = (one.sides for one in found.values())
    assert upright == flat[::-1] and upright[0] > upright[1] and not found[f"{layer}.vertical"].whole


@pytest.mark.full
@pytest.mark.parametrize("layout", options("attention/layout"))
def test_every_layout_that_agents_take(layout):
    try:
        model = model_of("swin_32px", num_classes=10, attention="agent", layout=layout)
    except UserError as error:
        assert "AgentCore cannot work" in str(error)
        return
    images, mixers = torch.randn(1, 3, 32, 32), dict(mixers_of(model))
    with torch.no_grad(), recorded(model) as calls:
        model(images)
        weights = {name: mixer.token_weights(*calls[name]).weights for name, mixer in mixers.items()}
    found = agents_of(model, mixers, images)
    for name, expected in weights.items():
        own = [one for layer, one in found.items() if layer.startswith(name)]
        through = torch.cat([one.read @ one.gathered.mT for one in own], dim=1)
        torch.testing.assert_close(through[expected != 0], expected[expected != 0], rtol=1e-4, atol=1e-5)


def test_pictures_and_table(given):
    model = model_of("vit_32px", **VIT, agent_tokens=4)
    report = agents(model, *given, images=2, shown=3)
    ((layer, _),) = mixers_of(model)
    assert list(report.pictures) == list(report.captions) and len(report.pictures) == 2
    titles = [axis.get_title() for axis in next(iter(report.pictures.values())).axes]
    panels = ["agent 0", "agent 2", "agent 3"]
    assert titles == [layer, *panels, "read by", *panels]
    rows = report.tables["agents"]
    assert len(rows) == 16 and [(row["row"], row["column"]) for row in rows[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sum(row["load"] for row in rows[:4]) == pytest.approx(1)
    assert report.figures[f"{layer}/agents"] == 4
    each = agents(model, *given, images=1, heads="each", shown=1)
    assert len(next(iter(each.pictures.values())).axes) == 2 * 4 * 2


def test_agents_whose_heads_are_gated(given):
    model = model_of("vit_32px", **VIT)
    to_moh(model, 2, 1)
    assert next(iter(agents(model.eval(), *given, images=1).figures)) == "stages.2.blocks.0.attn/agents"


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"shown": 12}, "probe: shown must be at most 11 agents, got 12; set probe.shown=6"),
        ({"shown": 0}, "probe: shown must be a whole number of at least 1, got 0"),
        ({"heads": 4}, "probe: heads=4 is none of the 4 heads of stages.2.blocks.0.attn; set probe.heads=mean"),
        ({"heads": "all"}, "probe: heads must be each, mean or the number of one, got all"),
    ],
)
def test_what_cannot_be_asked(given, asked, text):
    with pytest.raises(UserError) as error:
        agents(create_model("vit_32px", **VIT), *given, **asked)
    assert text in str(error.value)


def test_a_model_without_agents(given):
    text = "agents: no layer has agents, got SoftmaxCore; choose attention=agent"
    with pytest.raises(UserError, match=text):
        agents(create_model("vit_32px", num_classes=10), *given)
