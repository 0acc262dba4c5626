"""Which model it is, by its weights and its config."""

import hashlib

import torch
from torch import nn
from transformers import PretrainedConfig

from abkd.teachers.cache.manifest import digest_of

_BLOCK = 2**24
"""Numbers that are brought to main memory at a time."""
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of names, shapes, types and numbers of every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        for block in tensor.detach().flatten().split(_BLOCK):
            digest.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def config_digest(config: PretrainedConfig) -> str:
    """16 hexadecimal digits of what the config says beside its defaults: the same weights may compute other things."""
    said = config.to_diff_dict()
    return digest_of({name: value for name, value in said.items() if name not in _NOT_COMPUTED_WITH})
