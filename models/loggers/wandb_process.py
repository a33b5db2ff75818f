"""The process that talks to Weights & Biases for a run, so that nothing W&B does can hold or end the run itself.

It is started as a program by `models.loggers.weights_and_biases`, and imports nothing of ours. It reads lines of JSON:
first what to start with, then what to log, then that the run has ended; and writes lines of JSON about itself:
`started` with the mode that it came to, `failed` with the reason, `finished`. It outlives the signals of a job, and
ends soon after the process of the run has ended, however that was.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # meant for the run, which says what to do
REASON = 240  # letters of an error


class Service:
    """One W&B run.

    Args:
        said: where lines about it are written.
    """

    def __init__(self, said: TextIO) -> None:
        self.said, self.run, self.broken = said, None, False

    def say(self, event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}), file=self.said, flush=True)

    def attempt(self, call: Callable[..., Any], *args: Any) -> None:
        """Calls; after the first failure nothing is called any more."""
        if self.broken:
            return
        try:
            call(*args)
        except BaseException as error:  # some of its errors are no Exception
            self.broken = True
            self.say("failed", reason=" ".join(f"{type(error).__name__}: {error}".split())[:REASON])

    def start(self, given: dict[str, Any]) -> None:
        """Opens the run in the first mode that works; shows the configuration and names the best of each figure."""
        sys.argv = given["argv"]  # W&B shows with what a run was started
        os.environ.setdefault("WANDB_PROGRAM", sys.argv[0])
        os.environ.pop("WANDB_MODE", None)  # which may be set and empty; the modes to try are given
        self.attempt(self._set_up)
        if self.broken:
            return
        for mode in given["modes"]:
            self.broken = False
            self.attempt(self._open, given, mode)
            if not self.broken:
                self.say("started", mode=mode)
                return

    def _set_up(self) -> None:
        """Imports W&B elsewhere: it takes a server from ./wandb/settings too, which may have come with other files."""
        started = os.getcwd()
        os.chdir(os.path.dirname(os.path.abspath(__file__)))
        import wandb

        if hasattr(wandb, "setup"):
            wandb.setup()
        os.chdir(started)

    def _open(self, given: dict[str, Any], mode: str) -> None:
        import wandb

        known = getattr(wandb.Settings, "model_fields", given["settings"])  # older releases lack some
        settings = wandb.Settings(**{key: value for key, value in given["settings"].items() if key in known})
        self.run = wandb.init(**given["init"], id=given["ids"][mode], mode=mode, settings=settings)
        self.run.define_metric("trainer/global_step")
        self.run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        self.run.config.update(given["config"], allow_val_change=True)
        for name, best in given["best"].items():
            self.run.define_metric(name, summary=f"{best},last")

    def log(self, figures: dict[str, float]) -> None:
        self.run.log(figures)

    def image(self, given: dict[str, Any]) -> None:
        import wandb

        self.run.log({given["name"]: [wandb.Image(given["path"])]})

    def artifact(self, folder: str) -> None:
        """Makes a checkpoint an artifact of the run, called as the run."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", self.run.name), type="model")
        artifact.add_dir(folder)
        self.run.log_artifact(artifact, aliases=["best"])

    def finish(self, status: int) -> None:
        self.run.finish(status)


def main() -> None:
    """Does what it is told until it is told to finish, or nobody is left to tell."""
    for name in STOPS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # what W&B prints itself is not for the run's reader
        os.dup2(nowhere, stream)
    service, told = Service(said), os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(nowhere, 0)  # W&B asks nobody
    try:
        service.start(json.loads(told.readline()))
        status = 1  # of a run that ends without a word
        for line in told:
            order, content = json.loads(line)
            if order == "finish":
                status = content
                break
            service.attempt(getattr(service, order), content)
        service.attempt(service.finish, status)
        if not service.broken:
            service.say("finished")
    except (ValueError, OSError):  # the run was killed in the middle of a line, or does not listen any more
        pass
    finally:
        os._exit(0)  # W&B's own way out may wait for a server for ever


if __name__ == "__main__":
    main()
