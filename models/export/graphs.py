"""A model as ONNX, as a compiled package of torch, or as a trace; each gives back what runs the file that it wrote."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.errors import UserError
from models.export.agreement import Runs
from models.export.arguments import Wanted
from models.export.program import innermost, program, refusal, silence
from models.export.subject import Subject


class Written(NamedTuple):
    """What was written: its way to run, facts for its JSON file, and how somebody else runs it."""

    runs: Runs
    facts: dict[str, Any]
    use: str


def write_onnx(subject: Subject, path: Path, asked: Wanted) -> Written:
    """A graph of ONNX by torch's exporter, run by ONNX Runtime.

    Raises:
        UserError: an operation has no form in ONNX.
    """
    names, output = subject.names
    wanted = {"input_names": names, "output_names": [output], "opset_version": asked.opset}
    # of the model itself, so that what computes in another way in ONNX knows where it is
    exporter = partial(torch.onnx.export, dynamo=True, verbose=False, **wanted)
    made = program(subject, "onnx", asked.dynamic_size, exporter)
    made.model.metadata_props.update({key: json.dumps(value) for key, value in preparation(subject).items()})
    made.save(str(path))
    facts = {"opset": made.model.opset_imports[""]}
    use = f'onnxruntime.InferenceSession("{path.name}").run(None, {{"{names[0]}": images}})'
    return Written(runs_onnx(path, names), facts, use)


def runs_onnx(path: Path, names: tuple[str, ...]) -> Runs:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def runs(inputs: tuple[Tensor, ...]) -> Tensor:
        given = {name: value.cpu().numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return runs


def write_pt2(subject: Subject, path: Path, asked: Wanted) -> Written:
    """A package of AOTInductor: compiled for the device that the model is on, weights included.

    Raises:
        UserError: it cannot be compiled, for want of a C++ compiler among others.
    """
    graph = program(subject, "pt2", asked.dynamic_size)
    try:
        with silence():
            torch._inductor.aoti_compile_and_package(graph, package_path=str(path))
    except Exception as error:
        raise UserError(refusal(subject, "pt2", innermost(error))) from error
    package = torch._inductor.aoti_load_package(str(path))
    device = next(subject.model.parameters()).device.type
    use = f'torch._inductor.aoti_load_package("{path.name}")(images)'
    return Written(lambda inputs: package(*inputs), {"device": device, "torch": torch.__version__}, use)


def write_torchscript(subject: Subject, path: Path, asked: Wanted) -> Written:
    """A trace: what the model did with two images, for any number of them.

    Raises:
        UserError: the model cannot be traced, or only for two images.
    """
    try:
        with silence(), torch.no_grad():
            facts = {key: json.dumps(value) for key, value in preparation(subject).items()}
            traced = torch.jit.trace(subject.model, subject.of(0, 2), check_trace=False)
            torch.jit.save(traced, str(path), _extra_files=facts)
            loaded = torch.jit.load(str(path))
            loaded(*subject.of(1, 3))  # of a batch that has become a constant
    except Exception as error:
        raise UserError(refusal(subject, "torchscript", error)) from error
    return Written(
        lambda inputs: loaded(*inputs), {"torch": torch.__version__}, f'torch.jit.load("{path.name}")(images)'
    )


def preparation(subject: Subject) -> dict[str, Any]:
    """How images are prepared, and what the outputs are called: what somebody needs who has the file alone."""
    data = subject.data
    return {
        "image_size": list(subject.size),
        "channels": data.channels,
        "mean": list(data.mean),
        "std": list(data.std),
        "scaled_to": [0, 1] if data.depth != "float32" else None,
        "evaluation": {key: value for key, value in asdict(data.evaluation).items() if value is not None},
        "classes": subject.classes,
    }
