"""Factors on the weights: the recorded cases of URPE and iLLaMA, and what they change that a bias cannot."""

import re

import parity
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from models.attention import Grid, Site
from models.attention.biases.rpb import rpb
from models.attention.factors.soft_mask import soft_mask
from models.attention.factors.urpe import urpe
from models.attention.softmax import softmax_attention
from models.attention.transforms.rope import rope

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
KINDS = ("weight", "bias")


@pytest.mark.parametrize("name", [name for name in reference.cases("module") if name.startswith("urpe/")])
def test_urpe(name):
    """On a row of tokens, beside a bias of the same form; both tables are (2N − 1, M), key minus query."""
    hparams = reference.info(name)["hparams"]
    site = Site(hparams["embed_dim"], hparams["num_heads"], Grid(1, hparams["n"]), 0, 0, 1, "vit")
    module = softmax_attention(site, bias=rpb, factor=urpe)

    def state(theirs):
        parts = [f"attn.{part}_proj" for part in "qkv"]
        ours = {f"qkv.{kind}": torch.cat([theirs[f"{part}.{kind}"] for part in parts]) for kind in KINDS}
        ours |= {f"proj.{kind}": theirs[f"attn.out_proj.{kind}"] for kind in KINDS}
        tables = {"bias": "rp_bias", "factor": "ur_rp_bias"}
        return ours | {f"core.{key}.table": theirs[f"{value}.weight"].mT[:, None] for key, value in tables.items()}

    parity.check(name, module, state, lambda module, x: module(x, site.grid).x)


class Illama(nn.Module):
    """The authors' model around our mixers: class token last, so that it is a row of tokens without a prefix."""

    def __init__(self, hparams):
        super().__init__()
        dim, side = hparams["embed_dim"], hparams["img_size"] // hparams["patch_size"]
        self.grid = Grid(1, side**2 + 1)
        self.patch = nn.Conv2d(3, dim, hparams["patch_size"], hparams["patch_size"])
        self.class_token, self.position = (nn.Parameter(torch.zeros(1, n, dim)) for n in (1, self.grid.tokens))
        site = Site(dim, hparams["num_heads"], self.grid, 0, 0, hparams["depth"], "vit")
        parts = {
            "factor": lambda site: soft_mask(site, rho=hparams.get("soft_mask_rate", 0.0)),
            "transform": lambda site: rope(site, base=10000, axes="sequence"),
        }
        self.blocks = nn.ModuleList(IllamaBlock(softmax_attention(site, **parts), dim) for _ in range(site.depth))
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, hparams["num_classes"])

    def forward(self, images):
        x = self.patch(images).flatten(2).mT
        x = torch.cat([x, self.class_token.expand(len(x), -1, -1)], dim=1) + self.position
        for block in self.blocks:
            x = block(x, self.grid)
        return self.head(self.norm(x)[:, -1])


class IllamaBlock(nn.Module):
    def __init__(self, mixer, dim):
        super().__init__()
        hidden = 256 * -(-8 * dim // (3 * 256))
        self.norm1, self.norm2, self.mixer = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6), mixer
        self.fc1, self.fc3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, grid):
        x = x + self.mixer(self.norm1(x), grid).x
        y = self.norm2(x)
        return x + self.fc2(F.silu(self.fc1(y)) * self.fc3(y))


@pytest.mark.parametrize("name", [name for name in reference.cases("model") if name.startswith("illama/")])
def test_illama(name):
    module = Illama(reference.info(name)["hparams"])

    def state(theirs):
        renamed = {"cls_token": "class_token", "pos_embed": "position"}
        ours = {}
        for key, value in theirs.items():
            key = renamed.get(key, key).replace("patch_embed.proj", "patch")
            ours[key.replace(".attn.", ".mixer.").replace(".mlp.", ".")] = value
        return ours

    parity.check(name, module, state, lambda module, x: module(x))


def test_urpe_is_softmax_at_the_start():
    base, ours = softmax_attention(SITE), softmax_attention(SITE, factor=urpe)
    ours.load_state_dict(base.state_dict() | {"core.factor.table": ours.core.factor.table})
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(ours(x, SITE.grid).x, base(x, SITE.grid).x)


def test_urpe_tells_places_apart_in_a_constant_sequence_and_a_bias_cannot():
    x = torch.randn(1, 1, 16).expand(1, 20, 16)
    for parts, differs in (({"bias": rpb}, False), ({"factor": urpe}, True)):
        mixer = softmax_attention(SITE, **parts)
        nn.init.normal_(getattr(mixer.core, next(iter(parts))).table)
        y = mixer(x, SITE.grid).x
        assert torch.allclose(y, y[:, :1].expand_as(y), atol=1e-5) != differs


def test_prefix_tokens_keep_a_factor_of_one():
    for part in (urpe(SITE), soft_mask(SITE)):
        factor = part(SITE.grid._replace(prefix=1), SITE.grid._replace(prefix=1))
        assert factor.shape == (2, 21, 21) and (factor[:, 0] == 1).all() and (factor[:, :, 0] == 1).all()


def test_the_soft_mask_is_in_raster_order_and_leaves_the_sum_as_it_was():
    part = soft_mask(SITE, rho=0.25)
    tril = torch.ones(20, 20).tril()
    assert torch.equal(part(SITE.grid, SITE.grid)[0], tril + 0.25 * (1 - tril))
    mixer = softmax_attention(SITE, factor=lambda site: soft_mask(site))
    A = mixer.attention_matrix(torch.randn(1, 20, 16), SITE.grid)
    assert not A.triu(1).any() and (A.sum(-1)[..., :-1] < 1).all() and not mixer.core.row_stochastic


@pytest.mark.parametrize("rho", [-0.5, 1.5, "x"])
def test_wrong_options_are_named(rho):
    text = re.escape(f"soft_mask: rho must be a number between 0 and 1, got {rho!r}; set attention.factor.rho")
    with pytest.raises(ValueError, match=text):
        soft_mask(SITE, rho=rho)
