"""Forks a child for every program that is asked for, so that torch is imported once: see `programs.py`.

It has never run a backward pass, so it has no threads that a fork would leave behind. A request is a line of JSON:
arguments, folder, environment, what to run before, whether to draw, the file for the output and that for the status.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    import models.runs.evaluation
    import models.runs.training  # noqa: F401
    from models.runs import environment

    environment.packages()  # read once for all
    print("ready", flush=True)
    children: dict[int, str] = {}
    signal.signal(signal.SIGCHLD, lambda *_: _reap(children))
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until the child is in the list
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            _become(request)
        children[child] = request["status"]
        print(child, flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for child in list(children):
        os.killpg(child, signal.SIGKILL)


def _reap(children: dict[int, str]) -> None:
    """Writes the status of every child that has ended; a killed one has that of its signal, negative.

    A child that ends meanwhile calls this once more inside of it: whichever is first has the status.
    """
    for child in list(children):
        try:
            done, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:
            continue
        if done:
            place = Path(children.pop(child))
            place.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
            place.with_suffix(".new").rename(place)


def _become(request: dict) -> None:
    """The program, as `python train.py …` would be in a session of its own."""
    import torch

    torch.set_num_threads(1)  # makes the pool of threads anew that a fork leaves behind, before two threads do at once
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(request["folder"])
    for name, value in request["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    sys.argv = [str(ROOT / request["program"]), *request["arguments"]]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    status = 0
    if not request["pictures"]:
        _draw_nothing()
    if not any(argument.startswith("recipe=") for argument in request["arguments"]):
        _compose_once()
    try:
        if request["before"]:
            exec(compile(request["before"], "before", "exec"), {"__name__": "before"})
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    _leave(status)


def _draw_nothing() -> None:
    """Curves and charts take longer than the run that they are of."""
    from models.probes import accuracy
    from models.runs import ending

    ending.draw_curves = lambda *_: None
    accuracy.charts_of = lambda *_: {}


def _compose_once() -> None:
    """Hydra composes everything a second time for `hydra.mode`, which recipes alone set."""
    from hydra._internal.hydra import Hydra

    Hydra.get_mode = lambda hydra, config_name, overrides: None


def _leave(status: int) -> None:
    """As Python ends: what libraries registered for the end is done first."""
    import atexit
    import multiprocessing.util
    import threading

    try:
        threading._shutdown()
        multiprocessing.util._exit_function()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
