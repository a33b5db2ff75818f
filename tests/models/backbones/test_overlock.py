"""OverLoCK: the authors' modules with their weights, files in their names, its two passes, and its forms."""

import re
from functools import partial

import parity
import pytest
import reference
import torch
from timm.optim import param_groups_layer_decay

from conf import families
from models import create_model
from models.attention import Grid, Site
from models.attention.contmix import ContMix
from models.attention.moh import MoHAttention
from models.backbones.overlock import OverLoCK
from models.checkpoints import convert, export
from models.checkpoints.names.overlock import LAYOUTS
from models.layers.dilated_reparam import BRANCHES, DilatedReparam
from models.layers.folded_norms import fold_norms
from models.layers.overlock_block import ContextBlock, ReparamBlock

# of the authors' code: in training, and re-parameterised without the auxiliary classifier
PARAMETERS = {"xt": (17.31, 16.45), "t": (34.99, 33.47), "s": (58.31, 56.16), "b": (98.01, 94.94)}
COUNTER = "num_batches_tracked"  # of batch norms; the cases leave them as they were made


def cases(constructor: str) -> list[str]:
    return [n for n in reference.cases("module") if n.startswith("overlock/") and _made(n) == constructor]


def _made(name: str) -> str:
    return reference.info(name)["official_constructor"].rpartition(".")[2]


def checked(name: str, module: torch.nn.Module, ours: str, theirs: str, call) -> None:
    """`parity.check`; the projection behind ContMix has another name in the plug-in."""
    counters = {key: torch.tensor(0) for key in reference.info(name)["state"] if key.endswith(COUNTER)}
    take = parity.through(LAYOUTS[0], module, ours, theirs)

    def state(given):
        return take({key.replace("fusion_proj", "dyconv_proj"): value for key, value in (given | counters).items()})

    parity.check(name, module, state, call)


def on_map(call, x):
    grid = Grid(*x.shape[2:])
    return call(x.flatten(2).mT, grid)[0].mT.unflatten(2, grid[:2])


def block_of(hparams: dict, grid: Grid, context: int, first: bool = False) -> ContextBlock:
    site = Site(hparams["dim"], hparams["num_heads"], grid, 2, 0, 1, "hybrid", context=context)
    own = {"kernel_size": hparams["kernel_size"], "small_kernel": hparams.get("smk_size", 5)}
    scales = {"layer_scale": hparams["ls_init_value"], "scale_residual": hparams["res_scale"], "first": first}
    return ContextBlock(ContMix(site, **own), hparams["kernel_size"], mlp_ratio=hparams["mlp_ratio"], **scales)


def test_the_cases_are_found():
    modules = ("ContMixBlock", "DilatedReparamBlock", "DynamicConvBlock", "RepConvBlock")
    assert [len(cases(module)) >= least for module, least in zip(modules, (1, 1, 4, 1), strict=True)] == [True] * 4


@pytest.mark.parametrize("name", cases("DilatedReparamBlock"))
def test_large_kernels_equal_the_authors(name):
    hparams = reference.info(name)["hparams"]
    module = DilatedReparam(hparams["channels"], hparams["kernel_size"], hparams["deploy"])
    checked(name, module, "stages.0.blocks.0.large.", "blocks1.0.proj.1.", lambda module, x: module(x))


@pytest.mark.parametrize("name", cases("RepConvBlock"))
def test_blocks_without_a_mixer_equal_the_authors(name):
    hparams = reference.info(name)["hparams"]
    own = {"mlp_ratio": hparams["mlp_ratio"], "layer_scale": hparams.get("ls_init_value")}
    module = ReparamBlock(hparams["dim"], hparams["kernel_size"], scale_residual=hparams["res_scale"], **own)
    checked(name, module, "stages.0.blocks.0.", "blocks1.0.", on_map)


@pytest.mark.parametrize("name", cases("DynamicConvBlock"))
def test_blocks_of_two_streams_equal_the_authors(name):
    case = reference.info(name)
    hparams, context = case["hparams"], case["hparams"]["ctx_dim"] // 4
    module = block_of(hparams, Grid(*case["input_shape"][2:]), context, hparams.get("is_first", False))

    def call(module, x):
        return on_map(lambda x, grid: module(x, grid, 0.5 * x[..., -context:]), x)

    checked(name, module, "stages.2.blocks.0.", "sub_blocks3.0.", call)


@pytest.mark.parametrize("name", cases("ContMixBlock"))
def test_the_plug_in_equals_the_authors(name):
    case = reference.info(name)
    module = block_of(case["hparams"], Grid(*case["input_shape"][2:]), 0)
    checked(name, module, "stages.2.blocks.0.", "sub_blocks3.0.", on_map)


@pytest.mark.full
@torch.no_grad()
def test_the_auxiliary_classifier_equals_the_authors():
    name = "overlock/overlock_xt"
    model = create_model("overlock_xt").eval()
    model.load_state_dict(convert(reference.weights(name), "overlock_xt"))
    logits, losses, of_overview = model.forward_supervised(reference.model_input(name))
    assert reference.compare(name, "output", logits) <= parity.OUTPUT and not losses
    assert reference.compare(name, "aux_output", of_overview) <= parity.OUTPUT


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_in_training_and_for_inference(size):
    for name, wanted in zip((f"overlock_{size}", f"overlock_{size}_deploy"), PARAMETERS[size], strict=True):
        assert round(families.models()[name]["counted"]["parameters"] / 1e6, 2) == wanted


@pytest.mark.parametrize("deploy", [False, True])
def test_files_are_in_the_authors_names_and_come_back(deploy):
    name = "overlock_xt_deploy" if deploy else "overlock_xt"
    with torch.device("meta"):
        state = create_model(name, num_classes=5).state_dict()
    torch.manual_seed(0)
    state = {key: torch.randn(value.shape) if value.ndim else torch.tensor(3) for key, value in state.items()}
    file, theirs = export(state, name), reference.info("overlock/overlock_xt")["state"]
    if deploy:
        lost = {key for key in theirs if any(part in key for part in ("dil_", "origin_bn", "aux_head"))}
        assert theirs.keys() - file.keys() == lost
        assert all(key.endswith("lk_origin.bias") for key in file.keys() - theirs.keys())
    else:
        assert file.keys() == theirs.keys()
    assert all(list(file[key].shape[1:]) == theirs[key][0][1:] for key in file.keys() & theirs.keys())
    back = convert({"model": file}, name, num_classes=5)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def small(**settings) -> OverLoCK:
    """With statistics and scales away from their start, where norms and the branches of a kernel do nothing."""
    torch.manual_seed(0)
    model = create_model("overlock_32px", num_classes=5, **{"auxiliary": True} | settings)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape)) if "var" in key else value.add_(
                    0.1 * torch.randn(value.shape)
                )
    return model.double().eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", BRANCHES)
@torch.no_grad()
def test_branches_are_one_kernel(kernel):
    torch.manual_seed(kernel)
    module = DilatedReparam(4, kernel).double().eval()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2), part.weight.normal_(), part.bias.normal_()
    x = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(module.merged()(x), module(x))
    assert len(module.branches) == len(BRANCHES[kernel]) > 1


@torch.no_grad()
def test_deployed_it_computes_the_same_and_is_the_deployed_model():
    model, x = small(), images(48, 40)
    expected = model(x)
    plain = create_model("overlock_32px", num_classes=5, deploy=True).double().eval()
    plain.load_state_dict(model.deploy().state_dict())
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(plain(x), expected)
    assert not any(".branches." in key or key.startswith("aux_") for key in model.state_dict())


@torch.no_grad()
def test_folded_norms_leave_the_function_as_it_is():
    model, x = small(), images(48, 40)
    expected, norms = model(x), sum("running_var" in key for key in model.state_dict())
    folded = fold_norms(model)
    torch.testing.assert_close(model(x), expected)
    left = [key.removesuffix(".running_var") for key in model.state_dict() if key.endswith("running_var")]
    # in front of products, and of the auxiliary classifier
    assert left == ["stages.0.blocks.0.out_norm.bn", "stages.1.blocks.0.out_norm.bn", "aux_norm.bn"]
    assert folded == norms - len(left)


def test_its_sites_are_those_of_the_second_pass(recorder):
    own = {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "kernels": [9, 7, 5, 5], "focus_depths": [2, 1]}
    model = OverLoCK(recorder, (64, 96), 5, num_heads=[3, 4], **own)
    found = [(site.dim, site.num_heads, site.grid, site.stage, site.block, site.context) for site in recorder.sites]
    assert found == [
        (24, 3, Grid(4, 6), 2, 0, 8),
        (24, 3, Grid(4, 6), 2, 1, 8),
        (32, 4, Grid(2, 3), 3, 0, 8),
    ]
    assert all(site.kind == "hybrid" and site.positioned for site in recorder.sites)
    maps = model.eval().forward_pyramid(torch.randn(1, 3, 60, 84))
    assert [m.shape[1:] for m in maps] == [(8, 15, 21), (16, 8, 11), (32, 4, 6), (40, 2, 3)]


def test_drop_path_grows_over_both_passes_and_scales_are_those_of_the_last_two_stages():
    own = {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "kernels": [5] * 4, "focus_depths": [1, 1]}
    model = create_model("overlock_32px", drop_path=0.5, layer_scale=0.25, **own)
    first = [stage.blocks[0] for stage in model.stages[:2]]
    second = [model.stages[2].base.blocks[0], model.stages[2].overview.blocks[0]]
    third = [stage.blocks[0] for stage in model.stages[2:]]
    rates = [block.drop_path.drop_prob for block in (*first, *second, *third)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(isinstance(block.scale, torch.nn.Identity) for block in first)
    scales = [*(block.scale for block in second), *(s for block in third for s in (block.scale1, block.scale2))]
    assert all((scale.weight == 0.25).all() for scale in scales)
    assert len(third[0].context_scales) == 0 and len(third[1].context_scales) == 2


def test_layers_learn_at_rates_in_the_order_of_the_passes():
    model = create_model("overlock_32px", depths=[2, 2], focus_depths=[2, 1], auxiliary=True)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    rate = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    order = ["stem.conv.0.weight", *(f"stages.0.base.blocks.{b}.norm.weight" for b in range(2))]
    order += [f"stages.0.overview.blocks.{b}.norm.weight" for b in range(2)]
    order += [f"stages.0.blocks.{b}.norm1.weight" for b in range(2)]
    order += ["stages.1.blocks.0.norm1.weight", "head.weight"]
    rates = [rate[name] for name in order]
    assert rates == [0.5 ** (len(order) - 1 - i) for i in range(len(order))]
    assert rate["aux_head.weight"] == 0.5 and rate["stages.0.overview.downsample.conv.weight"] == rates[3]


def test_what_is_seen_again_depends_on_the_overview():
    """The context is added to the second pass of both stages, not only at its start."""
    model, x = small(focus_depths=[2, 1]), images(32, 32)
    blocks = [model.stages[0].blocks[1], model.stages[1].blocks[0]]
    with torch.no_grad():
        expected = model(x)
        for block in blocks:
            kept, scale = block.context_scales[1].weight.clone(), block.context_scales[1].weight
            scale.zero_()
            assert not torch.allclose(model(x), expected)
            scale.copy_(kept)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("at", ["mixer", "mlp", "block"])
def test_a_gate_weights_both_streams(at):
    model = create_model("overlock_32px", gate="se", gate_at=at, num_classes=5)
    block = model.stages[1].blocks[0]
    assert block.gate.site.dim == 80 and block.gate_at == at
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert block.gate.fc1.weight.grad.abs().sum() > 0


def test_heads_of_the_second_pass_are_gated():
    moh = partial(MoHAttention, core=ContMix, shared_heads=1, routed_heads=1)
    own = {"dims": [32, 64], "depths": [1, 1], "kernels": [5, 5], "focus_depths": [1, 1], "num_heads": [4, 8]}
    model = OverLoCK(moh, 32, 5, **own)
    logits, losses = model(torch.randn(2, 3, 32, 32), return_losses=True)
    (logits.square().sum() + losses["load_balance"].sum()).backward()
    routers = [block.attn.router for stage in model.stages for block in stage.blocks]
    assert all(parameter.grad.abs().sum() > 0 for router in routers for parameter in router.parameters())


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"focus_depths": [1]}, "OverLoCK: options with one entry per stage differ in length, got"),
        (
            {"dims": [32], "depths": [1], "kernels": [5]},
            "OverLoCK: the last two of its stages are looked at again, got 1 dims and 2 focus_depths; give at least",
        ),
        ({"dims": [32, 66]}, "OverLoCK: a quarter of the last channels are the context, got dims ending in 66; set"),
        (
            {"kernels": [6, 5]},
            "dilated_reparam: kernel must be one of 5, 7, 9, 11, 13, 15, 17, 19, got 6; set mod",
        ),
        ({"deploy": 1}, "OverLoCK: deploy must be true or false, got 1; set model.deploy=true or false"),
        ({"head_width": 0}, "OverLoCK: head_width must be a whole number of at least 1, got 0; set model.head_width"),
    ],
)
def test_bad_options_are_refused(own, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        create_model("overlock_32px", **own)
