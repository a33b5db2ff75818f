"""What a test does in two processes: forked from the server of tests/faults, and met by file."""

import os
from pathlib import Path

from tests.faults.programs import start

WAIT = 120


def pair(folder: Path, function: str, count: int = 2) -> list[str]:
    """Calls a function of this project in so many processes of one group; what each printed.

    Args:
        folder: for their meeting and their output.
        function: `module:name`; called with the folder.
    """
    module, _, name = function.partition(":")
    programs = [
        start(
            folder,
            before=f"from tests.models.engines.pairs import member; member({str(folder)!r}, {module!r}, {name!r})",
            env={"RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]
    for program in programs:
        assert program.wait(WAIT) == 0, program.text
    return [program.text for program in programs]


def member(folder: str, module: str, name: str) -> None:
    """One of the processes."""
    import importlib

    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    getattr(importlib.import_module(module), name)(Path(folder))
    dist.barrier()
    dist.destroy_process_group()
    raise SystemExit(0)
