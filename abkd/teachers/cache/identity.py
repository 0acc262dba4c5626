"""Which model it is, by its weights and its config."""

import hashlib

import torch
from torch import nn
from transformers import PretrainedConfig

from abkd.teachers.cache.manifest import digest_of

SAMPLED = 64
"""Numbers of each tensor."""
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of names, shapes, types and `SAMPLED` evenly spaced numbers of every weight: a model that
    was trained on is another one, and a large one takes no time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        chosen = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLED, len(flat)), dtype=torch.float64).long()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(flat[chosen.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def config_digest(config: PretrainedConfig) -> str:
    """16 hexadecimal digits of what the config says beside its defaults: the same weights may compute other things."""
    said = config.to_diff_dict()
    return digest_of({name: value for name, value in said.items() if name not in _NOT_COMPUTED_WITH})
