"""One training run over several processes, as `torchrun` starts them: who is who, whose rows, and sums.

Every process holds the whole model and works on its part of each batch. A process scales its mean loss by its
rows over those of the whole batch, so that gradients and losses of one process are the sums of all. In a
world of one every function here returns at once, and what it returns is what it was given.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lra.errors import Agreed, UserError, one_line
from lra.torchrun import launched
from models.common import Mechanism

SEED_STEP = 1_000_003
MOST_STEPS, MOST_S = 16, 2.0  # between two agreements on whether to stop


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's number, how many there are, and its number on this machine."""

    rank: int
    size: int
    local_rank: int


def world() -> World:
    """The world this process is in; alone, where no group was started."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1, 0)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return world().rank == 0


def start(device_name: str) -> World:
    """Joins the processes that torchrun started, once; afterwards the current GPU is this process's own.

    device_name: `train.device`. Tensors on the CPU are sent by gloo, those on a GPU by NCCL.
    """
    if not launched() or dist.is_initialized():
        return world()
    # Imported later, as compiling does, it would keep the group in default arguments and its threads alive.
    importlib.import_module("torch.distributed.nn.functional")
    if _on_gpus(device_name):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    return world()


def _on_gpus(device_name: str) -> bool:
    """Whether the run is one of GPUs; UserError if they are too few, or if one is asked for by number."""
    if device_name.startswith("cuda:"):
        raise UserError(
            f"train.device={device_name} under torchrun, which gives every process a GPU of its own; use "
            "train.device=cuda and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if device_name == "cpu" or (device_name == "auto" and not torch.cuda.is_available()):
        return False
    there, here = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"]) + 1
    asked = max(here, int(os.environ.get("LOCAL_WORLD_SIZE", here)))
    if asked > there:
        raise UserError(
            f"torchrun started {asked} processes on this machine, which has {there} GPUs for them; lower "
            "--nproc-per-node or use train.device=cpu"
        )
    return True


def stop() -> None:
    """Leaves the group; for when all processes do."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> int:
    """The last call of a process of several: leaves the group after a success and returns the status.

    After anything else the process ends here, since others may wait for it in the middle of a step, and
    leaving would wait for them; torchrun then ends those.
    """
    if status and world().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    stop()
    return status


def shares(rows: np.ndarray, world: World) -> list[np.ndarray]:
    """The contiguous part of a batch that each process works on, in order; sizes differ by one at most."""
    return np.array_split(rows, world.size)


def share(rows: np.ndarray, world: World) -> np.ndarray:
    """This process's part of a batch."""
    return shares(rows, world)[world.rank]


def check_batch(batch_size: int, micro_batch: int | None, world: World) -> None:
    """UserError where some process would get no row of a forward pass.

    Both sizes are of all processes together: the batch is cut as on one process, then each part is shared.
    """
    part = min(micro_batch or batch_size, batch_size)
    least = batch_size % part or part
    if least < world.size:
        cut = (
            "" if part == batch_size else f" with train.micro_batch={micro_batch}, the last of {least} rows,"
        )
        raise Agreed(
            f"batch_size={batch_size}{cut} is too small for {world.size} processes, as each needs a row; "
            "start fewer with --nproc-per-node or change the sizes"
        )


def check_mechanism(model: nn.Module, world: World) -> None:
    """UserError for a model that would learn something else on several processes than on one, with the
    reason.
    """
    if world.size == 1:
        return
    for module in model.modules():
        if isinstance(module, Mechanism) and (why := coupling(module)):
            raise Agreed(
                f"{module.name} would not learn on {world.size} processes what it learns on one: {why}; "
                "run it without torchrun"
            )


def coupling(mechanism: Mechanism) -> str | None:
    """How the rows of a training batch depend on each other in a mechanism; None where they do not."""
    if not mechanism.traits.batch_invariant:
        return mechanism.traits.because.get("batch_invariant") or "a row's output depends on those beside it"
    if any(getattr(parameter, "architecture", False) for parameter in mechanism.parameters()):
        return "validation batches train what chooses between its candidates"
    return "it has a loss of its own over all tokens of the batch" if has_own_loss(mechanism) else None


def has_own_loss(mechanism: Mechanism) -> bool:
    """Whether it adds to the loss itself; one that hands on the losses of those inside it does not."""
    inner = (module for module in mechanism.modules() if module is not mechanism)
    hands_on = any(isinstance(module, Mechanism) for module in inner)
    return type(mechanism).aux_loss is not Mechanism.aux_loss and not hands_on


@torch.no_grad()
def check_equal(model: nn.Module) -> None:
    """UserError if a weight or buffer is not the same, bit for bit, on all processes; it waits for them."""
    if world().size == 1:
        return
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    firsts = [tensor.detach().clone() for tensor in tensors.values()]
    broadcast_(firsts)
    pairs = zip(tensors.values(), firsts, strict=True)
    differs = torch.tensor([not torch.equal(_as_bytes(a), _as_bytes(b)) for a, b in pairs], dtype=torch.uint8)
    dist.all_reduce(differs, dist.ReduceOp.MAX)
    names = [name for name, unequal in zip(tensors, differs.tolist(), strict=True) if unequal]
    if names:
        raise Agreed(
            f"'{names[0]}' differs between the processes of this run: each computed it from its own part of "
            "the batch; run this model without torchrun"
        )


def sum_(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world().size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(local: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes, in order, on each: local [n ...], n = counts[rank] -> [sum n ...]."""
    here = world()
    assert len(counts) == here.size and len(local) == counts[here.rank], (len(local), counts)
    if here.size == 1:
        return local
    sent = local.new_zeros(max(counts), *local.shape[1:])
    sent[: len(local)] = local
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Makes each tensor what it is on the first process, in place, whatever its dtype."""
    if world().size == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(_as_bytes(sent), src=0)
        tensor.copy_(sent)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def any_process(flag: bool) -> bool:
    """Whether it is true on some process; it waits for all, but not for a GPU."""
    return bool(largest(flag))


def largest(value: float) -> float:
    """The largest value of all processes; it waits for them, but not for a GPU."""
    if world().size == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def of_first(function: Callable[[], Any]) -> Any:
    """What the function returns on the first process, on all of them; its error ends all of them."""
    if world().size == 1:
        return function()
    answer = [None, None]
    if is_first():
        try:
            answer = [function(), None]
        except Exception as error:
            dist.broadcast_object_list([None, one_line(error)], src=0, device=torch.device("cpu"))
            raise
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    value, refusal = answer
    if refusal is not None:
        raise Agreed(refusal)
    return value


def lost_another(error: Exception) -> bool:
    """Whether an error only says that another process of the run has gone."""
    return world().size > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


def barrier() -> None:
    """Waits until all processes are here, but not for a GPU."""
    any_process(False)


class Agreement:
    """Whether to stop, asked of all processes every few steps, the fewer the longer a step takes; alone, of
    this one at each.

    When to ask next follows from the longest time of all, so that all of them ask at the same steps.
    """

    def __init__(self, step: int) -> None:
        self.asked = self.next = step
        self.at = time.monotonic()

    def __call__(self, flag: bool, step: int, *, now: bool = False) -> bool:
        """Called by all before each step, and `now` where the answer is needed whatever the step."""
        if world().size == 1:
            return flag
        if step < self.next and not now:
            return False
        step_s = largest((time.monotonic() - self.at) / max(1, step - self.asked))
        self.asked, self.at = step, time.monotonic()
        self.next = step + max(1, int(min(MOST_STEPS, MOST_S / max(step_s, 1e-6))))
        return any_process(flag)


def seed_apart(seed: int) -> None:
    """Dropout of each process draws its own numbers; those of the first are those of a run of one.

    Called when the model is built, since initial weights come from the same generator.
    """
    if (rank := world().rank) > 0:
        torch.manual_seed(seed + rank * SEED_STEP)
