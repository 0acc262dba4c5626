"""The examples of a padded batch end to end in fewer rows, each with positions of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """What a model reads in the place of a padded batch; without an attention mask, which the positions stand for."""

    input_ids: Tensor
    """`[rows, width]`: width is that of the longest example, rows no more than examples."""
    position_ids: Tensor
    """`[rows, width]`: from 0 at the first token of each example, and at the first of the padding behind them."""
    places: Tensor
    """`[batch, length]`: where each token of the padded batch stands in the flattened rows; of padding, anywhere."""


def pack(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Each example, the longest first, goes into the first row that has room for it.

    Args:
        input_ids: `[batch, length]`.
        attention_mask: `[batch, length]`, 1 at tokens, 0 at padding.
    """
    lengths = attention_mask.sum(dim=1).tolist()
    width = max(lengths)
    starts = [0] * len(lengths)
    filled: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        row = next((row for row, used in enumerate(filled) if used + lengths[example] <= width), len(filled))
        filled += [0] if row == len(filled) else []
        starts[example] = row * width + filled[row]
        filled[row] += lengths[example]
    within = attention_mask.cumsum(dim=1) - 1
    places = torch.tensor(starts, device=input_ids.device).unsqueeze(1) + within
    is_token = attention_mask.bool()
    ids = input_ids.new_zeros(len(filled) * width)
    ids[places[is_token]] = input_ids[is_token]
    columns, used = torch.arange(width, device=ids.device), torch.tensor(filled, device=ids.device)
    positions = (columns - used.unsqueeze(1)).flatten()
    positions[places[is_token]] = within[is_token]
    return Packed(ids.view(-1, width), positions.view(-1, width), places)
