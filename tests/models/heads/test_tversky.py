"""The Tversky head: recorded cases, what its measures are, and the XOR that a linear head cannot."""

import parity
import pytest
import reference
import torch

from models.heads.linear import LinearHead
from models.heads.tversky import DIFFERENCES, INTERSECTIONS, TverskyHead


@pytest.mark.parametrize("name", [name for name in reference.cases("module") if name.startswith("tversky/")])
def test_references(name):
    hparams = reference.info(name)["hparams"]
    module = TverskyHead(
        hparams["embedding_dim"],
        hparams["prototypes"],
        features=hparams["fbank_size"],
        form=hparams["similarity_model"],
        intersection=hparams["intersection_reduction"],
        difference=hparams["difference_reduction"],
        normalize=hparams["normalize"],
    )
    names = {"prototypes.weight": "prototypes", "feature_bank.weight": "features"}
    parity.check(
        name,
        module,
        lambda theirs: {names.get(key, key): value for key, value in theirs.items()},
        lambda head, x: head(x),
    )


def head(**options) -> TverskyHead:
    made = TverskyHead(4, 3, features=6, normalize=False, **options)
    with torch.no_grad():
        made.features.copy_(torch.randn(6, 4))
        made.prototypes.copy_(torch.randn(3, 4))
    return made


@pytest.mark.parametrize("form", ["contrast", "ratio"])
@pytest.mark.parametrize("intersection", INTERSECTIONS)
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_measures_one_by_one(form, intersection, difference):
    """The sums of the formula, feature by feature."""
    made, x = head(form=form, intersection=intersection, difference=difference), torch.randn(5, 4)
    got = made(x)
    for b in range(5):
        for k in range(3):
            X, P = (v @ made.features.T for v in (x[b], made.prototypes[k]))
            X, P = X.clamp(min=0), P.clamp(min=0)
            both = (X > 0) & (P > 0)
            sums = torch.stack([X[both].sum(), P[both].sum()])
            f = {
                "product": (X * P).sum(),
                "mean": sums.mean(),
                "min": sums.min(),
                "max": sums.max(),
                "softmin": -torch.logsumexp(-sums, 0),
            }[intersection]
            more = torch.stack([sums[0] - sums[1], sums[1] - sums[0]]).clamp(min=0) * (difference == "substractmatch")
            lacking = 0.5 * (X[P == 0].sum() + more[0]) + 0.5 * (P[X == 0].sum() + more[1])
            expected = f - lacking if form == "contrast" else f / (f + lacking + 1)
            torch.testing.assert_close(got[b, k], expected, rtol=1e-5, atol=1e-5)


def test_a_prototype_is_most_similar_to_itself_by_ratio():
    """Nothing distinctive, so the share of the common is largest."""
    made = head(form="ratio", intersection="mean", difference="substractmatch")
    assert made(made.prototypes).argmax(1).tolist() == [0, 1, 2]


def trained_on_xor(module: torch.nn.Module) -> float:
    x, y = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    return (module(x).argmax(1) == y).float().mean().item()


def test_two_prototypes_learn_xor():
    assert trained_on_xor(LinearHead(2, 2)) < 1
    assert max(trained_on_xor(TverskyHead(2, 2, features=16, normalize=False)) for _ in range(4)) == 1


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"features": 0}, r"TverskyHead: features must be a whole number of at least 1, got 0; set head.features"),
        ({"form": "sum"}, r"TverskyHead: form must be contrast or ratio, got 'sum'; set head.form"),
        ({"intersection": "gmean"}, r"intersection must be one of product, .*, got 'gmean'; gmean has no gradient"),
        ({"difference": "none"}, r"difference must be ignorematch or substractmatch, got 'none'; set head.difference"),
        ({"normalize": 1}, r"normalize must be true or false, got 1; set head.normalize"),
    ],
)
def test_wrong_options(option, text):
    with pytest.raises(ValueError, match=text):
        TverskyHead(4, 3, **option)
