"""One run on several processes, a device each, as `torchrun` starts them: DDP, or FSDP2 for what one device cannot hold.

Every process draws the same samples of a step and computes its share of them. Losses are divided by what the whole step counts, so the
averaged gradients are those of one process with all samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from omnimamba.ops.plain_path import launching_on

Item = TypeVar("Item")

WAIT = datetime.timedelta(hours=2)
"""For what the main process does alone: validation, samples, the export of a large model."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run. By default this one alone, without a process group."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """Gloo, for small messages on the CPU."""
    saving: dist.ProcessGroup | None = None
    """Gloo, for the thread that writes checkpoints."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of the items of a step: every `size`-th, so that sorted lengths are spread evenly."""
        return list(items[self.rank :: self.size])

    def mean(self, values: Sequence[Tensor | float]) -> list[float]:
        """The mean over all processes of each number."""
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(numbers, group=self.control)
            numbers /= self.size
        return numbers.tolist()

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.size == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return int(number)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier(group=self.control)


ALONE = Processes()


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun has started with this one, and this one's device; outside torchrun this one alone on `device`."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        with launching_on(device):
            yield ALONE, device
        return
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        control, saving = (dist.new_group(backend="gloo", timeout=WAIT) for _ in range(2))
        assert isinstance(control, dist.ProcessGroup) and isinstance(saving, dist.ProcessGroup)
        yield Processes(dist.get_rank(), size, control, saving), device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within, there is a process group: torchrun's, or else one of this process alone, which Distributed Checkpoint asks for."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def distribute(module: nn.Module, blocks: Iterable[nn.Module], mode: str, processes: Processes, device: torch.device) -> nn.Module:
    """The module to call in a training step: in DDP, or sharded in place, block by block (the rest of the module is one more block).

    Everything stays fp32, also what FSDP gathers: autocast chooses the type of each operation as on one process, and A_log, D and
    dt_bias are never rounded.
    """
    if processes.size == 1:
        return module
    if mode == "ddp":
        device_ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (processes.size,))
    for block in (*blocks, module):
        sharded = fully_shard(block, mesh=mesh)
        if device.type == "cpu":
            assert isinstance(sharded, FSDPModule)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no average
    return module


@contextlib.contextmanager
def gradients_stay_here(module: nn.Module, yes: bool) -> Iterator[None]:
    """Within, a backward pass adds to this process's gradients and sends nothing: for all but the last part of a step."""
    if yes and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not yes)
        yield
    else:
        yield


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded module on the CPU of the main process, empty on others; all processes must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole, on all processes; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
