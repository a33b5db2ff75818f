"""DiT and MoH-DiT in the authors' files: names both ways, files of training runs, tables of another image size."""

import argparse
import warnings

import pytest
import reference
import torch
from omegaconf import OmegaConf

from conf.compose import compose_run
from models import create_model
from models.checkpoints import convert, export, fitting, load_weights
from models.checkpoints.__main__ import main
from models.runs.initial import start_from

SMALL = {"dim": 16, "depth": 2, "num_heads": 2, "image_size": 64}
MOH = {**SMALL, "shared_heads": [1, 2], "routed_heads": [1, 0], "num_heads": [3, 2], "head_dim": 8}


def small(name, seed=0, **settings):
    torch.manual_seed(seed)
    model = create_model(name, **{"num_classes": 5, **(MOH if "moh" in name else SMALL), **settings}).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def prediction(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5]))


def test_the_authors_names_and_shapes_map_completely_and_back():
    name = "moh_dit_s_2_90"  # the names of dit_s_2 and those of the routers
    entries = reference.info(f"moh/{name}")["state"]
    theirs = {key: torch.rand(shape) for key, (shape, _) in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = convert(theirs, name, num_classes=1000)
    with torch.device("meta"):
        create_model(name).load_state_dict(ours, assign=True)
    back = export(ours, name)
    assert set(back) == set(theirs) and all(torch.equal(back[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("name", ["dit_s_2", "moh_dit_s_2_75"])
def test_files_of_training_runs(name, tmp_path):
    """As train.py of the authors writes them: raw and averaged weights, the optimizer's state, and the arguments."""
    settings = MOH if "moh" in name else SMALL
    raw, averaged = small(name), small(name, seed=7)
    optimizer = torch.optim.AdamW(raw.parameters())
    raw(torch.randn(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long)).sum().backward()
    optimizer.step()
    weights = [export(model.state_dict(), name, **settings) for model in (raw, averaged)]
    content = dict(zip(("model", "ema"), weights, strict=True))
    arguments = argparse.Namespace(model="DiT-S/2", image_size=256, global_batch_size=256)
    torch.save(content | {"opt": optimizer.state_dict(), "args": arguments}, tmp_path / "0400000.pt")
    for wanted, ema in ((raw, False), (averaged, True)):
        model = small(name, seed=9)
        model.load_state_dict(convert(load_weights(tmp_path / "0400000.pt", ema=ema), name, **settings))
        assert torch.equal(prediction(model), prediction(wanted))


def test_the_position_table_is_made_where_a_file_lacks_it():
    model = small("dit_s_2")
    theirs = export(model.state_dict(), "dit_s_2", **SMALL)
    del theirs["pos_embed"]
    ours = convert(theirs, "dit_s_2", **SMALL)
    assert torch.equal(ours["stem.position.sinusoid"], model.stem.position.sinusoid)


def of_diffusers(model):
    """The weights as `DiTTransformer2DModel` names them."""
    state, block, embedding = model.state_dict(), "transformer_blocks.{}.", "transformer_blocks.{}.norm1.emb."
    named = {"stem.patch_embed.proj": "pos_embed.proj", "final.modulation": "proj_out_1", "final.linear": "proj_out_2"}
    for i in range(2):
        named |= {
            f"stages.0.blocks.{i}.modulation": block.format(i) + "norm1.linear",
            f"stages.0.blocks.{i}.attn.proj": block.format(i) + "attn1.to_out.0",
            f"stages.0.blocks.{i}.mlp.fc1": block.format(i) + "ff.net.0.proj",
            f"stages.0.blocks.{i}.mlp.fc2": block.format(i) + "ff.net.2",
        }
    theirs = {f"{to}.{end}": state[f"{name}.{end}"] for name, to in named.items() for end in ("weight", "bias")}
    for i in range(2):
        theirs[embedding.format(i) + "class_embedder.embedding_table.weight"] = state["stem.labels.weight"]
        for end in ("weight", "bias"):
            for layer, name in ((0, "linear_1"), (2, "linear_2")):
                theirs[f"{embedding.format(i)}timestep_embedder.{name}.{end}"] = state[f"stem.timestep.{layer}.{end}"]
            parts = state[f"stages.0.blocks.{i}.attn.qkv.{end}"].chunk(3)
            theirs |= {f"{block.format(i)}attn1.to_{x}.{end}": part for x, part in zip("qkv", parts, strict=True)}
    return theirs


def test_files_of_diffusers():
    model = small("dit_s_2")
    theirs = of_diffusers(model)
    ours = convert(theirs, "dit_s_2", **SMALL)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items())
    changed = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    theirs[changed] = theirs[changed] + 1
    table = fitting.best(fitting.tables("dit_s_2", SMALL), theirs)
    problem = fitting.problem_of(table, fitting.learned(table, theirs), "dit_s_2")
    assert problem == f"the file has {changed!r}, which dit_s_2 has not (names of diffusers)"


def test_a_file_of_another_image_size():
    theirs = export(small("dit_s_2").state_dict(), "dit_s_2", **SMALL)
    larger = {**SMALL, "image_size": (64, 96)}
    with pytest.warns(UserWarning, match=r"another image size, .* were resized: 'stem.position.sinusoid'"):
        ours = convert(theirs, "dit_s_2", **larger)
    wanted = small("dit_s_2", **larger)
    assert torch.equal(ours["stem.position.sinusoid"], wanted.stem.position.sinusoid)
    wanted.load_state_dict(ours)
    assert torch.equal(prediction(wanted), prediction(small("dit_s_2")))


def test_what_does_not_fit_is_named():
    theirs = export(small("dit_s_2").state_dict(), "dit_s_2", **SMALL)
    with pytest.raises(ValueError, match="the file must have 3 classes, got 5"):
        convert(theirs, "dit_s_2", num_classes=3, **SMALL)
    gated = {**MOH, "num_heads": 2, "shared_heads": 1, "routed_heads": 1}
    assert _problem(theirs, "moh_dit_s_2_90", gated).startswith(
        "the file lacks 'blocks.0.attn.wg.weight' and 3 more of"
    )
    del theirs["final_layer.linear.bias"]
    assert _problem(theirs, "dit_s_2", SMALL).startswith("the file lacks 'final_layer.linear.bias' of dit_s_2")


def _problem(theirs, name, settings):
    """What `convert` would say, without its search for a model that fits better."""
    return fitting.problem_of(fitting.best(fitting.tables(name, settings), theirs), theirs, name)


def test_a_run_starts_from_the_authors_weights_with_other_classes(tmp_path):
    """Only the table of classes begins anew."""
    given = small("dit_s_2")
    torch.save({"ema": {}, "model": export(given.state_dict(), "dit_s_2", **SMALL)}, tmp_path / "dit.pt")
    overrides = [f"{'' if key == 'image_size' else 'model.'}{key}={value}" for key, value in SMALL.items()]
    cfg, choices = compose_run(["model=dit_s_2", *overrides, "data.num_classes=3"])
    cfg.run = {key: choices[key] for key in ("model", "attention")}
    model = small("dit_s_2", seed=4, num_classes=3)
    table = model.stem.labels.weight.detach().clone()
    notes = start_from(
        str(tmp_path / "dit.pt"),
        model,
        {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("run", "model", "attention")},
    )
    assert notes[1:] == ["the table of classes starts anew: 5 classes in the weights, 3 in the data"]
    for name, value in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], table if name == "stem.labels.weight" else value)


def test_the_command_says_how_to_load_the_file(tmp_path, capsys):
    theirs = {key: torch.ones(shape) for key, (shape, _) in reference.info("moh/dit_s_2")["state"].items()}
    torch.save({"ema": theirs}, tmp_path / "dit.pt")
    out = tmp_path / "out.safetensors"
    main(["convert", str(tmp_path / "dit.pt"), "--model", "dit_s_2", "--ema", "-o", str(out)])
    text = capsys.readouterr().out
    assert "1000 classes, names of facebookresearch/DiT and SkyworkAI/MoH → this project" in text
    assert f'create_model("dit_s_2", num_classes=1000).load_state_dict(load_weights("{out}"))' in text
    assert torch.equal(load_weights(out)["stem.position.sinusoid"], theirs["pos_embed"])
