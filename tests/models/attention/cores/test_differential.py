"""Differential attention against timm's, and what the difference of two maps does."""

import pytest
import torch
from timm.layers import DiffAttention

from models.attention import Grid, Refused, Site
from models.attention.cores.differential import differential_attention

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=3, depth=4, kind="vit")


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"dual_lambda": True}, {"qkv_bias": False}], ids=str)
def test_it_is_timms(options):
    theirs = DiffAttention(16, 2, depth=3, **{"qkv_bias": True} | options).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = differential_attention(SITE, **options).double()
    state = {key: value for key, value in theirs.state_dict().items() if key.startswith(("qkv", "proj"))}
    state["core.norm.weight"] = theirs.sub_norm.weight
    if options.get("qk_norm"):
        state |= {f"core.{name}.weight": getattr(theirs, name).weight for name in ("q_norm", "k_norm")}
    if options.get("dual_lambda"):
        state["core.lambda_q"] = torch.stack([theirs.lambda_a, theirs.lambda_b])[:, None]
    else:
        state["core.lambda_q"] = torch.stack([theirs.lambda_q1, theirs.lambda_q2])
        state["core.lambda_k"] = torch.stack([theirs.lambda_k1, theirs.lambda_k2])
    ours.load_state_dict(state)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x, SITE.grid).x, theirs(x), rtol=1e-5, atol=1e-6)


def test_what_both_maps_attend_to_cancels():
    mixer = differential_attention(SITE)
    with torch.no_grad():
        for part in (0, 1):  # the two halves of every head's queries, and keys, become the same
            rows = mixer.qkv.weight[16 * part : 16 * part + 16].view(2, 2, 4, 16)
            rows[:, 1] = rows[:, 0]
            bias = mixer.qkv.bias[16 * part : 16 * part + 16].view(2, 2, 4)
            bias[:, 1] = bias[:, 0]
    A = mixer.attention_matrix(torch.randn(1, 20, 16), SITE.grid)
    sums = (1 - mixer.core.difference()).expand(1, 2, 20)
    torch.testing.assert_close(A.sum(-1), sums)
    assert (A >= 0).all()  # the same map, times 1 − λ
    assert abs(mixer.core.start - (0.8 - 0.6 * 2.718281828**-0.9)) < 1e-6


def test_odd_heads_are_refused():
    with pytest.raises(Refused, match=r"differential: 3 channels per head do not divide into two halves; change"):
        differential_attention(SITE._replace(dim=6))
