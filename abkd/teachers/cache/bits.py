"""Integers of any width end to end in bytes, the lowest bit first."""

import torch
from torch import Tensor


def num_bytes(count: int, width: int) -> int:
    """That `count` integers of `width` bits take."""
    return -(-count * width // 8)


def pack_bits(values: Tensor, width: int) -> Tensor:
    """uint8 `[num_bytes(n, width)]` of int64 `[n]`, 0 <= values < 2^width, width from 1 to 56."""
    packed = torch.zeros(num_bytes(len(values), width) + 8, dtype=torch.int64)
    first, shift = _places(len(values), width)
    shifted = values << shift
    for byte in range(_span(width)):
        packed.index_add_(0, first + byte, (shifted >> 8 * byte) & 255)  # no two integers share a bit: a sum is an or
    return packed[: num_bytes(len(values), width)].to(torch.uint8)


def unpack_bits(packed: Tensor, count: int, width: int) -> Tensor:
    """int64 `[count]`, what `pack_bits` packed."""
    first, shift = _places(count, width)
    padded = torch.cat([packed, packed.new_zeros(8)])
    values = torch.zeros(count, dtype=torch.int64)
    for byte in range(_span(width)):
        values |= padded[first + byte].long() << 8 * byte
    return (values >> shift) & ((1 << width) - 1)


def _places(count: int, width: int) -> tuple[Tensor, Tensor]:
    """Of each integer: its first byte, and the bits before it there."""
    start = torch.arange(count, dtype=torch.int64) * width
    return start >> 3, start & 7


def _span(width: int) -> int:
    """Bytes that an integer may touch; at most 7 bits stand before it."""
    return (width + 7 + 7) // 8
