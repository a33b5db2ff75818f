"""How the processes of a run find each other."""

import os
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import ClusterEnvironment
from torch.distributed.rendezvous import rendezvous

from conf.errors import RunFailed

ANSWER = 30  # seconds in which the store answers, else whoever keeps it is gone
_met: list[dist.Store] = []  # of the process group, which outlives the runs of a sweep
_watches = count()


def meet(environment: ClusterEnvironment, backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Starts the process group, unless it stands.

    Processes that torchrun has started again find what those before them wrote in the store of their launcher, the
    address of a dead process among it: every attempt has names of its own there.

    Args:
        environment: knows the ranks and where to meet.
        backend: `nccl` or `gloo`.
        timeout: of every operation that waits for other processes.
        device: of this process; None for the CPU.

    Raises:
        RunFailed: some process does not come.
    """
    if dist.is_initialized():
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    rank, world = environment.global_rank(), environment.world_size()
    try:
        store, rank, world = next(rendezvous("env://", rank, world, timeout=timeout))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RunFailed(
            f"trainer: process {rank} of {world} has not met all others within {timeout.total_seconds():g} s, got "
            f"{str(error).splitlines()[0].rstrip('.')}; see what these print, or raise trainer.timeout"
        ) from error
    store.set_timeout(timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    _met[:] = [store]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)


def watch_store() -> dist.Store | None:
    """A connection to the store of the group for one watch over it; None where somebody else has made the group."""
    if not _met:
        return None
    store = dist.PrefixStore(f"watch-{next(_watches)}", _met[0].clone())
    store.set_timeout(timedelta(seconds=ANSWER))
    return store
