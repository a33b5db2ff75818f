"""Probes of routes, agents, heads, clusters and pools from the command line to the files."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models import create_model

pytestmark = pytest.mark.full
CASES = {  # what is chosen besides vit_32px, and what is written
    "routing_map": ({"attention": "biformer"}, ["cat.png", "routes.csv"]),
    "agents": ({"attention": "agent"}, ["agents.csv", "cat.png"]),
    "clusters": ({"attention": "boat"}, ["cat.png", "clusters.csv"]),
    "dependency_tree": ({"attention": "reversed"}, ["cat.png", "tokens.csv"]),
    "pool_map": ({"pool": "simpool"}, ["pool_map.png", "queries.csv"]),
    "slots": ({"pool": "slot"}, ["slots.csv", "slots.png"]),
    "heads": ({"attention": "moh"}, ["heads.csv", "heads.png", "loads-by-class.png", "loads.csv", "loads.png"]),
}


@pytest.mark.parametrize("probe", CASES)
def test_a_probe_and_what_it_refuses(command, tmp_path, probe):
    chosen, files = CASES[probe]
    for name, parts in (("mine", chosen), ("plain", {})):
        torch.manual_seed(0)
        model = create_model("vit_32px", num_classes=10, depth=1, dim=32, **parts)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "cat.jpg")
    given = ("model=vit_32px", "model.depth=1", "model.dim=32", "data=digits", f"probe={probe}")
    asked = ("probe.limit=3", "data.batch_size=2") if probe == "heads" else ("input=cat.jpg",)
    own = [f"{group}={part}" for group, part in chosen.items()]
    status, out, err = command("eval", "ckpt=mine.safetensors", *given, *own, *asked)
    assert status == 0, err
    (folder,) = (tmp_path / "evaluation").glob(f"*-{probe}")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "report.html"])
    assert folder.with_suffix(".json").exists() and str(folder.name) in out
    if probe != "heads":  # which says something of any model
        status, _, err = command("eval", "ckpt=plain.safetensors", *given, *asked)
        assert status == 2 and f"eval.py: {probe}: " in err and "choose" in err and "Traceback" not in err
