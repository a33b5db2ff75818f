"""The cluster that started this process, as Lightning is told of it."""

from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


def cluster() -> list[SLURMEnvironment]:
    """SLURM's environment for a process of srun, without Lightning's own handlers; else Lightning finds it itself.

    They write a checkpoint in the middle of a step and put the job into the queue while it goes on.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]
