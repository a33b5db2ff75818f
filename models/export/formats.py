"""What a model can be exported as, and what each of these forms needs and can hold. Torch-free."""

from importlib.util import find_spec
from typing import NamedTuple

from conf.errors import UserError
from conf.extras import requirement


class Format(NamedTuple):
    """One form of a model outside of this project.

    what: it is, for people. suffixes: of the file, none for a folder. packages: that writing it needs. resizes:
    whether it can leave the size of the images open. quantizes: whether its weights can be whole numbers of 8 bits.
    graph: whether it holds what is computed, and not weights for the model of this project.
    """

    what: str
    suffixes: tuple[str, ...]
    packages: tuple[str, ...] = ()
    resizes: bool = False
    quantizes: bool = False
    graph: bool = True


FORMATS = {
    "onnx": Format(
        "a graph for ONNX Runtime and others, for any batch",
        (".onnx",),
        ("onnx", "onnxscript", "onnxruntime"),
        resizes=True,
        quantizes=True,
    ),
    "pt2": Format("a compiled package of torch (AOTInductor) that runs without this project", (".pt2",), resizes=True),
    "torchscript": Format("a trace that torch.jit.load reads, in C++ too", (".pt", ".ts")),
    "safetensors": Format("the weights, with the configuration that makes their model", (".safetensors",), graph=False),
    "hf": Format("a folder to upload to Hugging Face's hub, with a model card", (), graph=False),
}


def refuse_missing(name: str) -> None:
    """What a format needs has to be installed.

    Raises:
        UserError: a package is not.
    """
    if missing := [package for package in FORMATS[name].packages if find_spec(package) is None]:
        lines = " ".join(f"'{requirement(package)}'" for package in missing)
        raise UserError(
            f"format={name} needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}, which "
            f"{'are' if len(missing) > 1 else 'is'} not installed; run: python -m pip install {lines}"
        )
