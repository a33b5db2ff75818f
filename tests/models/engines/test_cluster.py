"""Lightning's own handlers are off where SLURM started the process."""

import pytest

from models.engines.cluster import cluster

SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}


@pytest.fixture
def outside(monkeypatch):
    for name in (*SLURM, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_slurm_lightning_finds_out_itself(outside):
    assert cluster() == []


@pytest.mark.case(13)
def test_slurm_does_not_requeue(outside):
    for name, value in SLURM.items():
        outside.setenv(name, value)
    (found,) = cluster()
    assert found.auto_requeue is False
    outside.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun within an allocation
    assert cluster() == []
