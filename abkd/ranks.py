"""The processes of one launch: who speaks, what they agree on, what they add up. One process alone needs no group.

`torchrun` and `accelerate launch` start the same command several times. Every process is a rank; the first of them,
rank 0, prints and writes. Imports torch only where there are several.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from abkd.errors import InputError

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)
"""How long a rank waits for the others: the first one may be answering evaluation sets meanwhile."""


def rank() -> int:
    group = _group()
    return group.get_rank() if group else int(os.environ.get("RANK", 0))


def num_ranks() -> int:
    group = _group()
    return group.get_world_size() if group else int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    return rank() == 0


def join(*, on_cpu: bool) -> None:
    """Makes the process group of a launch of several processes, the one that the Trainer will find.

    Args:
        on_cpu: gloo, even where there are GPUs; else NCCL where there are some, with gloo beside it.

    Raises:
        InputError: the launch is not of several processes that know of each other.
    """
    if num_ranks() == 1 or _group():
        return
    import torch
    from accelerate import PartialState

    on_cpu = on_cpu or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "cuda:nccl,cpu:gloo", timeout=TIMEOUT)
    if state.num_processes != num_ranks():
        raise InputError(
            f"launch: WORLD_SIZE={num_ranks()}, but {state.num_processes} process would train alone; "
            "start it with torchrun --nproc-per-node N -m abkd ..."
        )


def leave() -> None:
    """Ends the process group, where all are done."""
    if group := _group():
        group.barrier()
        group.destroy_process_group()


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks, on every rank. Values are pickled."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * num_ranks()
    group.all_gather_object(values, value)
    return values


def on_all(work: Callable[[], T]) -> T:
    """`work()`, done on every rank; an InputError of one of them is raised on all."""
    result, error = None, None
    try:
        result = work()
    except InputError as raised:
        error = raised
    for message in gather(error and str(error)):
        if message is not None:
            raise InputError(message) from error
    return result  # type: ignore[return-value]


def on_first(work: Callable[[], T]) -> T:
    """What `work()` gives on the first rank, which alone does it; its InputError is raised on all."""
    return gather(on_all(lambda: work() if is_first() else None))[0]  # type: ignore[return-value]


def summed(numbers: Mapping[str, float]) -> dict[str, float]:
    """Each number summed over the ranks, the same to the last bit on all of them."""
    values = gather(dict(numbers))
    return {name: sum(value[name] for value in values) for name in numbers}


def take_from_first(tensors: Iterable[Any]) -> None:
    """Each tensor becomes that of the first rank, in place; on every rank in the same order."""
    if group := _group():
        for tensor in tensors:
            group.broadcast(tensor, src=0)


def share(items: Sequence[T]) -> list[T]:
    """This rank's part of what all have: as many on each rank, the last of all taken twice where it does not divide."""
    count = num_ranks()
    return [items[min(index, len(items) - 1)] for index in range(rank(), -(-len(items) // count) * count, count)]


def unshared(parts: Sequence[T], num_items: int) -> list[T]:
    """All items, on every rank, in the order that `share` found them in."""
    return [item for items in zip(*gather(list(parts)), strict=True) for item in items][:num_items]


def may_refuse() -> bool:
    """True on the one rank that tells the user of an InputError: the first that asks, if there is a group."""
    group = _group()
    return is_first() if group is None else _store(group).add("abkd/refused", 1) == 1


def others_refused() -> bool:
    """Whether a rank has ended with an InputError: then what fails here fails for want of it."""
    group = _group()
    return group is not None and _store(group).check(["abkd/refused"])


def _group() -> Any:
    """torch.distributed where a process group exists, else None; does not import it."""
    distributed = sys.modules.get("torch.distributed")
    exists = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if exists else None


def _store(group: Any) -> Any:
    """What the ranks share beside their collectives; it lives on when one of them ends."""
    return group.distributed_c10d._get_default_store()
