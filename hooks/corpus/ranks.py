"""Processes that torchrun, accelerate launch or srun started: each takes a shard."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PATIENCE = timedelta(days=30)  # shards end at different times


def rank_and_size() -> tuple[int, int]:
    """This process's number, from 0, and how many there are: (0, 1) for one alone."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        number, of = os.environ.get(rank, ""), os.environ.get(size, "")
        if number.isdigit() and of.isdigit() and "MASTER_ADDR" in os.environ:
            return int(number), int(of)
    return 0, 1


def gathered(report: Any, rank: int, size: int) -> list[Any]:
    """The reports of all ranks, in every one of them.

    Raises:
        RuntimeError: a rank was lost; those that came say which.
    """
    group = None
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_PATIENCE)
    elif dist.get_backend() != "gloo":
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        dist.monitored_barrier(group, timeout=_PATIENCE, wait_all_ranks=True)
        reports: list[Any] = [None] * size
        dist.all_gather_object(reports, report, group=group)
    finally:
        if own:
            dist.destroy_process_group()
    return [report for report in reports if report is not None]
