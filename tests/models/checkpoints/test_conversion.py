"""`convert` and `export`: the authors' names and shapes to ours and back, strictly; errors say what is wrong."""

import sys
import warnings

import pytest
import reference
import timm
import torch
from timm.models.davit import DaVit
from torch.func import functional_call

from models import create_model
from models.checkpoints import convert, export, fitting
from models.checkpoints.conversion import source_of
from models.checkpoints.names.biformer import LAYOUTS

SMALL = {"dims": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
# of the authors' code: model, and whether it is the backbone of their detectors
CASES = {
    "biformer/biformer_tiny": ("biformer_tiny", False),
    "biformer/biformer_stl": ("biformer_stl", False),
    "biformer/biformer_stl_nchw": ("biformer_stl_nchw", False),
    "biformer/biformer_mm_tiny__nwin8_autopad_200x264": ("biformer_tiny", True),
    "davit/davit_tiny": ("davit_tiny", False),
    "agent/agent_cswin_tiny": ("agent_cswin_tiny", False),
    "agent/agent_deit_tiny": ("agent_deit_tiny", False),
    "agent/agent_pvt_tiny": ("agent_pvt_tiny", False),
    "flatten/flatten_cswin_tiny": ("flatten_cswin_tiny", False),
    "flatten/flatten_pvt_v2_b0": ("flatten_pvt_v2_b0", False),
    "flatten/flatten_swin_tiny": ("flatten_swin_tiny", False),
    "inline/inline_swin_tiny": ("inline_swin_tiny", False),
    "davit/davit_mm_tiny__200x264": ("davit_tiny", True),
}


def numbered(shapes, start=0):
    """A state dict in which no two neighbouring elements are equal, from shapes and types by name."""
    state = {}
    for place, (name, (shape, dtype)) in enumerate(shapes.items(), start):
        count = torch.Size(shape).numel()
        state[name] = (torch.arange(count) + place).view(shape).to(getattr(torch, dtype))
    return state


def recorded(case):
    """What the authors' state dict holds: {name: ((sides), type)}."""
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in reference.info(case)["state"].items()}


def layout_of(state):
    return {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()}


def small(name, features_only=False, classes=5):
    """The state dict of a small model of ours."""
    with torch.device("meta"):
        model = fitting.create_model(name, features_only=features_only, num_classes=classes, **SMALL)
    return numbered(layout_of(model.state_dict()))


@pytest.fixture(scope="module", autouse=True)
def models():
    """Each model without memory is made once for all tests of this file: composing one takes a third of a second."""
    made = {}

    def remembered(name, **settings):
        key = name, str(sorted(settings.items())), torch.get_default_device().type
        if key not in made:
            made[key] = create_model(name, **settings)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "create_model", remembered)
        yield made


def renamed(ours, layout):
    """Our weights in the names of a layout."""
    parts = layout.names(ours)
    return {name: piece for key, value in ours.items() for name, piece in layout.give(key, value, parts[key]).items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture(scope="module")
def tiny():
    """A small biformer_tiny in the authors' names, not to be changed."""
    return export(small("biformer_tiny"), "biformer_tiny", **SMALL)


@pytest.mark.parametrize("case", CASES)
def test_the_authors_names_and_shapes_map_completely_and_back(case):
    name, pyramid = CASES[case]
    theirs = numbered(recorded(case))
    with torch.device("meta"):
        model = create_model(name, features_only=pyramid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = convert(theirs, name)
    model.load_state_dict(ours, assign=True)
    back = export(ours, name)
    assert layout_of(back) == recorded(case)
    constant = "relative_position_index"  # is not read but made, see below
    assert all(torch.equal(back[key], value) for key, value in theirs.items() if not key.endswith(constant))
    assert same(convert(back, name), ours)


def small_timm(name):
    """A small model of timm, our model of the same shape, and what it is made with."""
    if name == "vit_tiny":
        theirs = timm.create_model(
            "deit_tiny_patch16_224", embed_dim=32, depth=6, num_heads=2, num_classes=5, img_size=64
        )
        return theirs, {"dim": 32, "depth": 6, "num_heads": 2, "image_size": 64}
    if name == "convnext_tiny":
        shape = {"depths": [1, 2, 1, 1], "dims": [32, 32, 64, 64]}
        return timm.create_model("convnext_tiny", num_classes=5, ls_init_value=0.5, **shape), shape
    shape = {"depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4]}
    if name == "swin_tiny":
        theirs = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, num_classes=5, **shape)
        return theirs, {"dims": [16, 32, 64, 128], **shape}
    theirs = timm.create_model("pvt_v2_b0", embed_dims=[16, 32, 32, 64], num_classes=5, **shape)
    return theirs, {"dims": [16, 32, 32, 64], **shape}


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny", "pvt_v2_b0", "convnext_tiny"])
def test_timm_s_names_of_the_plain_backbones(name):
    torch.manual_seed(0)
    theirs, settings = small_timm(name)
    ours = convert(theirs.state_dict(), name, num_classes=5, **settings)
    model = create_model(name, num_classes=5, **settings).eval()
    model.load_state_dict(ours)
    images = torch.randn(2, 3, *([64, 64] if name == "vit_tiny" else [224, 224]))
    torch.testing.assert_close(model(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
    assert "timm" in source_of(theirs.state_dict(), name, **settings)
    assert same(convert(export(ours, name, **settings), name, **settings), ours)


def test_the_constants_of_swin_s_windows_are_written_as_its_code_makes_them():
    name, shape = "flatten_swin_tiny", {"dims": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
    model = create_model(name, num_classes=5, **shape)
    written = export(model.state_dict(), name, num_classes=5, **shape)
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4]
    )
    block = theirs.layers[2].blocks[1]
    torch.testing.assert_close(written["layers.2.blocks.1.attn_mask"], block.attn_mask)
    index = written["layers.2.blocks.1.attn.relative_position_index"]
    torch.testing.assert_close(index, block.attn.relative_position_index)
    assert sum(key.endswith("attn_mask") for key in written) == 1


def test_a_mask_that_a_file_brings_decides_for_maps_of_its_size():
    """As in the authors' code, where it is part of the weights; nothing of it is left at another size."""
    name, shape = "flatten_swin_tiny", {"dims": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
    torch.manual_seed(0)
    model, other = (create_model(name, num_classes=5, **shape).eval() for _ in range(2))
    state = export(model.state_dict(), name, num_classes=5, **shape)
    state["layers.2.blocks.1.attn_mask"] = torch.zeros_like(state["layers.2.blocks.1.attn_mask"])
    other.load_state_dict(convert(state, name, num_classes=5, **shape))
    mixers = [m.stages[2].blocks[1].attn for m in (model, other)]
    assert [mixer.runs().fused for mixer in mixers] == [True, False]
    assert "brought a mask" in mixers[1].runs().reason
    with torch.no_grad():
        images = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 224, 448)
        assert not torch.allclose(model(images[0]), other(images[0]), atol=1e-6)
        torch.testing.assert_close(model(images[1]), other(images[1]))


@pytest.mark.parametrize(("was", "now"), [(224, 256), (256, 224), (224, 448)])
@pytest.mark.parametrize("ours", [False, True], ids=["authors", "ours"])
def test_masks_of_windows_come_and_go_with_the_image_size(was, now, ours):
    """At 224 pixels the last stage of a Swin is one window, at 256 it has shifted ones."""
    name, shape = "agent_swin_tiny", {"dims": [16, 32, 64, 128], "depths": [1, 1, 1, 2], "num_heads": [1, 2, 2, 4]}
    state = create_model(name, image_size=was, num_classes=5, **shape).state_dict()
    given = state if ours else export(state, name, image_size=was, num_classes=5, **shape)
    with pytest.warns(UserWarning, match="were resized"):
        other = convert(given, name, image_size=now, num_classes=5, **shape)
    model = create_model(name, image_size=now, num_classes=5, **shape)
    model.load_state_dict(other)
    assert model.stages[3].blocks[1].attn.usual_mask
    assert any(key.endswith("shift_mask") for key in other) == (now != 224)


def test_an_export_changes_no_weight():
    settings = {"dims": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "num_classes": 5}
    state = create_model("agent_swin_tiny", image_size=96, **settings).state_dict()
    with pytest.raises(
        ValueError, match=r"export: stages.0.blocks.0.attn.core.gather_bias.row must have the shape \(1, "
    ):
        export(state, "agent_swin_tiny", **settings)


RESIZED = {  # model and settings, weights that depend on the size of the image
    ("agent_deit_tiny", "depth=4 dim=32 num_heads=2"): ("stem.position.table", ".row", ".column"),
    ("flatten_pvt_tiny", ""): ("position.table", "core.positional_encoding"),
    ("flatten_swin_tiny", ""): ("core.positional_encoding", "shift_mask"),
    ("agent_cswin_tiny", ""): (".row", ".column"),
}


@pytest.mark.parametrize(("name", "given"), RESIZED)
@pytest.mark.parametrize("ours", [False, True], ids=["authors", "ours"])
def test_a_file_of_another_image_size_gives_the_function_it_has_there(name, given, ours):
    """What is resized in the file is what the smaller model itself would resize for the larger image."""
    settings = {key: int(value) for key, value in (item.split("=") for item in given.split())}
    if not settings:
        settings = {"dims": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 4]}
    settings["num_classes"] = 5
    torch.manual_seed(0)
    small_model = create_model(name, image_size=224, **settings).eval()
    for parameter in small_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = small_model.state_dict() if ours else export(small_model.state_dict(), name, image_size=224, **settings)
    with pytest.warns(
        UserWarning, match=rf"convert: {name} from .*: tables made for another image size, .* were resized: '"
    ):
        larger = convert(state, name, image_size=(224, 448), **settings)
    model = create_model(name, image_size=(224, 448), **settings).eval()
    model.load_state_dict(larger)
    changed = [k for k, v in small_model.state_dict().items() if v.shape != larger[k].shape]
    assert changed and all(key.endswith(RESIZED[name, given]) for key in changed)
    images = torch.randn(1, 3, 224, 448)
    with torch.no_grad():
        torch.testing.assert_close(model(images), small_model(images), rtol=1e-4, atol=1e-5)


def test_tables_of_larger_windows_and_other_agents_are_resized_too():
    shape = {"dims": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 4], "num_classes": 5}
    state = export(create_model("swin_tiny", **shape).state_dict(), "swin_tiny", **shape)
    with pytest.warns(UserWarning, match=r"resized: 'stages.0.blocks.0.attn.core.bias.table' and 4 more"):
        larger = convert(state, "swin_tiny", image_size=384, window=12, **shape)
    create_model("swin_tiny", image_size=384, window=12, **shape).load_state_dict(larger)
    with pytest.warns(UserWarning, match="gather_bias.block' and 31 more"):
        agents = convert(_agents(9), "vit_tiny", **AGENTS, agent_tokens=16)
    create_model("vit_tiny", **AGENTS, agent_tokens=16).load_state_dict(agents)


AGENTS = {"attention": "agent", "dim": 32, "depth": 4, "num_heads": 2, "image_size": 64, "num_classes": 5}


def _agents(count):
    return create_model("vit_tiny", **AGENTS, agent_tokens=count).state_dict()


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(
        ValueError, match=r"block must have the shape \(2, 16, 7, 7\).*: a table for 6 agents is resized only"
    ):
        convert(_agents([2, 3]), "vit_tiny", **AGENTS, agent_tokens=16)
    state = create_model("vit_tiny", **AGENTS | {"image_size": (64, 96)}).state_dict()
    with pytest.raises(ValueError, match="a table for 24 tokens is resized only from a square, got no square number"):
        convert(state, "vit_tiny", **AGENTS)


def test_timm_names_give_timm_s_results():
    torch.manual_seed(0)
    theirs = DaVit(depths=(1, 1, 1, 1), embed_dims=SMALL["dims"], num_heads=SMALL["num_heads"], num_classes=5).eval()
    ours = convert(theirs.state_dict(), "davit_tiny", num_classes=5, **SMALL)
    model = create_model("davit_tiny", num_classes=5, **SMALL).eval()
    model.load_state_dict(ours)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert source_of(theirs.state_dict(), "davit_tiny", **SMALL) == "timm"
    assert source_of(export(ours, "davit_tiny", **SMALL), "davit_tiny", **SMALL) == "dingmyu/davit"


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw", "davit_tiny", "swin_tiny"])
@pytest.mark.parametrize("features_only", [False, True])
def test_our_own_names_are_taken_as_they_are(name, features_only):
    ours = small(name, features_only)
    assert same(convert(ours, name, **SMALL), ours)
    assert source_of(ours, name, **SMALL) == "this project"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.source)
def test_every_form_of_biformer_s_weights_is_read(layout):
    name = "biformer_stl" if "STL" in layout.source else "biformer_tiny"
    ours = small(name)
    theirs = renamed(ours, layout)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert same(convert(theirs, name, **SMALL), ours)
    assert source_of(theirs, name, **SMALL) == layout.source


def test_the_other_form_of_biformer_is_another_function_and_says_so():
    second = export(small("biformer_stl_nchw"), "biformer_stl_nchw", **SMALL)
    with pytest.warns(UserWarning, match=r"convert: biformer_stl from .*nchw.*: biformer_stl_nchw is the model that"):
        convert(second, "biformer_stl", **SMALL)
    with pytest.warns(UserWarning, match=r"convert: biformer_stl_nchw from .*first form.*: biformer_stl is the model"):
        convert(export(small("biformer_stl"), "biformer_stl", **SMALL), "biformer_stl_nchw", **SMALL)
    ours = small("biformer_tiny")
    rewritten = renamed(ours, LAYOUTS[2])
    with pytest.warns(UserWarning, match="attention=biformer_nchw is the setting that gives its results"):
        convert(rewritten, "biformer_tiny", **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(convert(rewritten, "biformer_tiny", attention="biformer_nchw", **SMALL), ours)


def test_nests_and_prefixes(tiny):
    ours = convert(tiny, "biformer_tiny", **SMALL)
    prefixed = {f"module.{key}": value for key, value in tiny.items()}
    for content in (
        {"model": tiny},
        {"state_dict": prefixed, "epoch": 3},
        {"model": {"state_dict": prefixed}},
        prefixed,
    ):
        assert same(convert(content, "biformer_tiny", **SMALL), ours)


def test_a_prefix_of_any_name_is_found_and_what_is_beside_is_said():
    ours = create_model("vit_32px", dim=32, depth=1, num_classes=5).state_dict()
    settings = {"dim": 32, "depth": 1}
    inside = {f"student.encoder.{key}": value for key, value in ours.items()}
    assert same(convert(inside, "vit_32px", **settings), ours)
    beside = {f"teacher.encoder.{key}": 0 * value for key, value in ours.items()} | inside
    with pytest.warns(UserWarning, match=r"below 'student.encoder.' were taken, and 'teacher.* more left out"):
        assert same(convert(beside | {"criterion.weight": torch.ones(5)}, "vit_32px", **settings), ours)


@pytest.mark.parametrize("name", ["biformer_tiny", "davit_tiny"])
def test_of_a_detector_the_backbone_is_taken(name):
    ours = small(name, features_only=True)
    backbone = {f"backbone.{key}": value for key, value in export(ours, name, **SMALL).items()}
    detector = {**backbone, "neck.lateral_convs.0.conv.weight": torch.ones(2), "bbox_head.bias": torch.ones(3)}
    content = {"meta": {"epoch": 12}, "state_dict": detector}
    assert same(convert(content, name, **SMALL), ours)
    segmenter = {"state_dict": {f"module.{key}": value for key, value in detector.items()}}
    assert same(convert(segmenter, name, **SMALL), ours)


def test_counters_that_old_files_lack_are_filled(tiny):
    old = {key: value for key, value in tiny.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(tiny)
    ours = convert(old, "biformer_tiny", **SMALL)
    model = create_model("biformer_tiny", num_classes=5, **SMALL)
    model.load_state_dict(ours)
    counters = {key: value for key, value in ours.items() if key.endswith("num_batches_tracked")}
    assert len(counters) == len(tiny) - len(old)
    assert all(value.dtype == torch.int64 and value == 0 for value in counters.values())


def test_other_types_of_numbers_are_kept(tiny):
    half = {key: value.half() if value.is_floating_point() else value for key, value in tiny.items()}
    ours = convert(half, "biformer_tiny", **SMALL)
    assert {value.dtype for value in ours.values()} == {torch.float16, torch.int64}


def test_names_that_do_not_fit(tiny):
    def refused(state, text):
        with pytest.raises(ValueError, match=text):
            convert(state, "biformer_tiny", **SMALL)

    less = {key: value for key, value in tiny.items() if not key.startswith("stages.0.0.norm")}
    refused(less, r"convert: the file lacks 'stages\.0\.0\.norm1\.weight' and 3 more of biformer_tiny \(names of "
            r"rayleizhu/BiFormer\); give the model, and the settings, that the file was saved from")  # fmt: skip
    refused(tiny | {"aux_head.weight": torch.ones(2)}, r"the file has 'aux_head\.weight', which biformer_tiny has not")
    refused(
        {"a": torch.ones(1), "b": torch.ones(1)}, r"2 of the 2 names in the file are none of biformer_tiny, got 'a'"
    )
    refused(
        tiny | {"norm.weight": torch.ones(3)}, r"norm\.weight must have the shape \(64\) in biformer_tiny, got \(3,\)"
    )
    refused(
        tiny | {"head.weight": torch.ones(5, 3)},
        r"head\.weight must have the shape \(classes, 64\) in .*, got \(5, 3\)",
    )
    refused(tiny | {"head.bias": torch.tensor(1.0)}, r"head\.bias must have the shape \(classes\) in .*, got \(\)")
    refused(
        tiny | {"head.bias": torch.ones(4)},
        r"must have one number of classes, got \{'head\.weight': 5, 'head\.bias': 4\}",
    )


def test_what_is_no_state_dict():
    with pytest.raises(ValueError, match="convert: no weights were found, got the state dict with the keys: epoch"):
        convert({"epoch": 3}, "biformer_tiny")
    with pytest.raises(ValueError, match="convert: a mapping of weights was expected, got Linear in the state dict"):
        convert(torch.nn.Linear(1, 1), "biformer_tiny")


def test_another_size_of_the_family_is_named():
    with torch.device("meta"):
        state = create_model("biformer_small").state_dict()
    with pytest.raises(ValueError, match=r"convert: .*biformer_tiny.*; it holds biformer_small$"):
        convert(state, "biformer_tiny")


def test_the_number_of_classes():
    state = export(small("davit_tiny", classes=21841), "davit_tiny", **SMALL)
    assert len(convert(state, "davit_tiny", num_classes=21841, **SMALL)["head.weight"]) == 21841
    assert len(convert(state, "davit_tiny", **SMALL)["head.weight"]) == 21841
    with pytest.raises(
        ValueError,
        match=r"convert: the file must have 1000 classes, got 21841; fine-tune it, or evaluate it on .* 21841 classes$",
    ):
        convert(state, "davit_tiny", num_classes=1000, **SMALL)
    pyramid = small("davit_tiny", features_only=True)
    with pytest.raises(
        ValueError, match=r"has no classifier, got the backbone of a detector or segmenter; give a class"
    ):
        convert(pyramid, "davit_tiny", num_classes=1000, **SMALL)


def test_models_that_nobody_else_has():
    with pytest.raises(ValueError, match=r"export: coatnet_0 has no names but ours.*; available for agent_\*, biform"):
        export({"a": torch.ones(1)}, "coatnet_0")
    for name in ("biformer_tinny", "layout_tiny", "no.such_model"):
        with pytest.raises(ValueError, match=rf"there is no model '{name}'"):
            convert({"a": torch.ones(1)}, name)
        with pytest.raises(ValueError, match=f"export: {name} has no names but ours"):
            export({"a": torch.ones(1)}, name)


@pytest.mark.parametrize("name", ["biformer_stl_nchw", "davit_tiny"])
def test_gradients_arrive_at_the_authors_own_tensors(name):
    theirs = export(create_model(name, num_classes=5, **SMALL).state_dict(), name, **SMALL)
    learned = {k: v.requires_grad_() for k, v in theirs.items() if v.is_floating_point() and "running" not in k}
    model = create_model(name, num_classes=5, **SMALL).eval()
    output = functional_call(model, convert(theirs, name, **SMALL), (torch.randn(1, 3, 64, 64),))
    output.square().sum().backward()
    without = [key for key, value in learned.items() if value.grad is None or value.grad.shape != value.shape]
    assert learned and not without


def test_the_largest_published_model_is_renamed_in_no_time(models):
    with torch.device("meta"):
        state = create_model("davit_base").state_dict()
    theirs = export(state, "davit_base")
    fitting._skeleton_of_file.cache_clear()
    models.clear()
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        convert(theirs, "davit_base")
    finally:
        sys.setprofile(None)
    assert calls < 3_000_000  # of Python functions, less than a second; 0.9 million, most of them to compose the model
