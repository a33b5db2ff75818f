"""Nothing that comes from somebody else is executed, and the code has no place where it could be."""

import ast
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from models.checkpoints import load_weights
from models.diffusion.latents import LOADING
from tests.faults.programs import ROOT

FILES = [path for folder in ("conf", "data", "kernels", "models") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES += [ROOT / name for name in ("train.py", "eval.py", "hubconf.py")]
# names that are called nowhere, and what must stand in the calls of others
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads"),
    *("dill.load", "joblib.load", "shelve.open", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
    *("runpy.run_path", "shutil.unpack_archive", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("tempfile.mktemp", "extractall", "np.fromregex"),
}

# of our own: a graph that was just written is tried, and a job starts train.py
OWN = ("models/export/graphs.py torch.jit.load", "models/runs/launchers/job.py runpy.run_path")


def name_of(node: ast.expr) -> str:
    """`a.b.c` of a call."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name_of(node.func), node


def keyword(node: ast.Call, name: str) -> object:
    found = next((given.value for given in node.keywords if given.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else found


@pytest.mark.case(31)
@pytest.mark.case(37)
def test_the_code_has_no_call_that_would_execute_a_file():
    wrong = []
    for place, name, node in calls():
        last = name.rpartition(".")[2]
        known = f"{place.partition(':')[0]} {name}" in OWN
        if not known and (name in FORBIDDEN or last in ("extractall", "unsafe_load")):
            wrong.append(f"{place}: {name}")
        if name == "torch.load" and keyword(node, "weights_only") is not True:
            wrong.append(f"{place}: torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and keyword(node, "allow_pickle") is not False:
            wrong.append(f"{place}: numpy.load without allow_pickle=False")
        if any(given.arg == "allow_pickle" for given in node.keywords) and keyword(node, "allow_pickle") is not False:
            wrong.append(f"{place}: allow_pickle")
        if keyword(node, "trust_remote_code") is not None:
            wrong.append(f"{place}: trust_remote_code")
        if name == "yaml.load" and not safe(node):
            wrong.append(f"{place}: yaml.load with another loader than the safe one")
        if name.startswith("subprocess.") and keyword(node, "shell") is not None:
            wrong.append(f"{place}: a shell")
        if last == "open" and name.startswith("Image.") and keyword(node, "formats") is None:
            wrong.append(f"{place}: Image.open without formats")
        if last == "from_pretrained":  # its options stand together in LOADING
            assert {given.arg or ast.unparse(given.value) for given in node.keywords} == {"local_files_only", "LOADING"}
    assert LOADING["use_safetensors"] is True
    assert not wrong


def safe(node: ast.Call) -> bool:
    """Whether a YAML loader is the safe one, or its twin in C."""
    return "SafeLoader" in ast.unparse(node) or any(
        isinstance(given, ast.Name) and given.id == "loader" for given in node.args
    )


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payloads(mark: Path):
    command = f"touch {mark}"
    return {
        "os.system": Evil(os.system, command),
        "subprocess": Evil(subprocess.check_output, ["touch", str(mark)]),
        "eval": Evil(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(mark)!r}, 'w')"),
        "import": Evil(__import__, "antigravity"),
        "torch.hub": Evil(torch.hub.load, str(mark.parent), "x"),
        "in weights": {"model": {"a": torch.ones(1), "b": Evil(os.system, command)}},
        "in a key": {"state_dict": {"a": torch.ones(1)}, "args": Evil(os.system, command)},
    }


@pytest.mark.case(31)
@pytest.mark.parametrize("name", payloads(Path("x")))
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_no_pickle_runs(tmp_path, monkeypatch, name, form):
    mark = tmp_path / "ran"
    file = tmp_path / "weights.pth"
    if form == "plain":
        file.write_bytes(pickle.dumps(payloads(mark)[name]))
    else:
        torch.save(payloads(mark)[name], file, _use_new_zipfile_serialization=form == "zip")
    for variable in (None, "1"):
        if variable is not None:
            monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
        with pytest.raises(ValueError, match=r"^load_weights: "):
            load_weights(file)
        assert not mark.exists() and "antigravity" not in sys.modules


@pytest.mark.case(31)
def test_a_variable_that_turns_safety_off_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    assert load_weights(tmp_path / "a.pth").keys() == {"a"}
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD set; unset that variable"):
        load_weights(tmp_path / "a.pth")


@pytest.mark.case(34)
def test_an_archive_that_unpacks_into_more_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as honest, zipfile.ZipFile(tmp_path / "b.pth", "w") as packed:
        for member in honest.namelist():
            packed.writestr(member, honest.read(member), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pth").stat().st_size < 2**16
    with pytest.raises(ValueError, match="is compressed, which torch never does"):
        load_weights(tmp_path / "b.pth")


@pytest.mark.case(36)
def test_the_script_of_a_data_set_is_not_run(tmp_path):
    pytest.importorskip("datasets")
    from data.sources.huggingface import HuggingFace

    (tmp_path / "set").mkdir()
    (tmp_path / "set/set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"^HuggingFace: the data set cannot be read, got .*set "):
        len(HuggingFace(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache")).train)
    assert not (tmp_path / "ran").exists()


@pytest.mark.full
@pytest.mark.case(46)
def test_settings_of_the_working_directory_do_not_redirect_wandb(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "here/wandb").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "here/wandb/settings").write_text("[default]\nbase_url = http://127.0.0.1:9\nentity = thief\n")
    code = (
        "import sys; from models.loggers.wandb_process import Service; service = Service(sys.stdout); "
        f"given = {{'init': {{'dir': {str(tmp_path / 'run')!r}, 'project': 'p'}}, 'ids': {{'offline': 'a'}}, "
        "'settings': {'silent': True, 'console': 'off'}, 'config': {}, 'best': {}, 'argv': ['train.py'], "
        "'modes': ['offline']}; service.start(given); "
        "print('URL', service.run.settings.base_url, service.run.settings.entity); service.run.finish()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "here",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "URL https://" in done.stdout, done.stdout + done.stderr
    assert "127.0.0.1" not in done.stdout and "thief" not in done.stdout
