"""Compares data parallel replicas of the weights, which could otherwise diverge without an error."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.interfaces import TrainingError
from megatron_dlm.platform.distributed_optimizer import complete_weights
from megatron_dlm.platform.fp8_weights import bits
from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session


class ReplicaHook(Hook):
    """Compares the bits of all weights between replicas, which nothing else would notice to differ."""

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Compare when due; where replicas differ, stop and name the parameter and the ranks at fault."""
        every = session.config.training.check_replicas_every
        group = session.parallel.replica_group
        if session.config.parallel.fully_sharded:
            # No rank has a weight that another has.
            return
        if not every or progress.step % every or dist.get_world_size(group) == 1:
            return
        complete_weights(session.optimizer)
        parameters = dict(session.denoiser.named_parameters())
        mine = bit_sums([bits(parameter) for parameter in parameters.values()])
        sums = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sums, mine, group=group)
        found = torch.stack(sums)
        usual = found.mode(dim=0).values
        different = (found != usual).nonzero().tolist()
        # Agreed among all, so that no other stage waits for ranks that have left.
        worst = torch.tensor(len(different), device=session.parallel.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if not worst:
            return
        if not different:
            raise TrainingError(f"step {progress.step}: weights differ between replicas of another stage")
        ranks = sorted({dist.get_global_rank(group, replica) for replica, _ in different})
        names = [list(parameters)[index] for _, index in different]
        raise TrainingError(
            f"step {progress.step}: weights differ between replicas: rank {', '.join(map(str, ranks))}, "
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}; memory fault?"
        )


def bit_sums(tensors: list[Tensor]) -> Tensor:
    """A number for each tensor that any single changed bit changes.

    Args:
        tensors: contiguous, of 1, 2 or 4 byte elements.

    Returns:
        int64 [len(tensors)]: sums of the bit patterns taken as integers.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return torch.stack([t.detach().view(integers[t.element_size()]).sum(dtype=torch.int64) for t in tensors])
