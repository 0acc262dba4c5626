"""A model in shards over all ranks, by FSDP2."""

from typing import Any

from torch.distributed.fsdp import fully_shard

from abkd.models.students import layer_stack


def shard(model: Any) -> None:
    """Splits the weights of every decoder layer, and of what is around them, over all ranks, in place.

    Each layer is gathered for its own forward and split again after it. For a frozen model; all ranks call it, and from
    then on run their forwards together. Needs a process group, and puts the model on its devices.
    """
    for layer in layer_stack(model, "training.engine=fsdp2", "use training.engine=ddp")[1]:
        fully_shard(layer)
    fully_shard(model)
