"""The systems of the literature here, of conf/systems.yaml: what chooses each, and what vouches for it."""

import shlex
from typing import NamedTuple

import yaml

from conf.names import CONF

CASES = CONF.parent / "tests" / "references"


class System(NamedTuple):
    """A row of the file; `choose` holds settings of train.py, `proof` families of cases or files of tests."""

    name: str
    paper: str
    choose: list[str]
    status: str
    proof: list[str]

    @property
    def command(self) -> str:
        """What a user types."""
        return shlex.join(["python", "train.py", *self.choose])

    @property
    def shown(self) -> str:
        """The status; of cases also how many of them the project keeps."""
        if not self.status.startswith("cases"):
            return self.status
        return f"{self.status} ({sum(len(list((CASES / family).glob('*.npz'))) for family in self.proof)})"


def rows() -> list[System]:
    """All of them, by name."""
    listed = yaml.safe_load((CONF / "systems.yaml").read_text())
    return sorted((System(**row) for row in listed), key=lambda row: row.name.lower())
