"""Where training runs: device, threads, and the processes of `torchrun` that share the work.

torchrun --nproc-per-node 2 -m -- specmoe.cli train ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """rank of world processes; device this one computes on."""

    rank: int
    world: int
    device: torch.device
    _summed: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and draws the progress bar."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
            # gloo's threads let go of a sum's tensor when it is long done. To be the last to do so takes the
            # interpreter, and aborted the process where that was shutting down: so keep it until the next.
            self._summed[:] = [values]
        return values

    def sum_gradients(self, module: torch.nn.Module) -> None:
        """Add up every gradient over all processes, all at once."""
        if self.world == 1:
            return
        parameters = list(module.parameters())
        # A process without a share of the step has no gradient at all.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes `torchrun` started beside this one; use a GPU if there is one, else all cores."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_world = (
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    use_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if use_gpu else torch.device("cpu")
    if not use_gpu:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if world == 1:
        yield Processes(0, 1, device)
        return
    distributed.init_process_group("nccl" if use_gpu else "gloo")
    try:
        yield Processes(distributed.get_rank(), world, device)
        distributed.barrier()  # nobody leaves while another waits for a sum
    finally:
        distributed.destroy_process_group()
