"""Integers end to end in bytes, against Python's own integers of any length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd.teachers.cache.bits import num_bytes, pack_bits, unpack_bits


def packed_by_hand(values, width):
    """One long integer, its lowest byte first."""
    whole = sum(value << width * index for index, value in enumerate(values))
    return list(whole.to_bytes(-(-len(values) * width // 8), "little"))


@st.composite
def integers(draw):
    width = draw(st.integers(1, 56))
    return draw(st.lists(st.integers(0, 2**width - 1), max_size=40)), width


@settings(max_examples=60)
@given(integers())
def test_they_are_one_long_integer_and_come_back(given_integers):
    values, width = given_integers
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), width)
    assert packed.dtype == torch.uint8 and len(packed) == num_bytes(len(values), width)
    assert packed.tolist() == packed_by_hand(values, width)
    assert unpack_bits(packed, len(values), width).tolist() == values


@pytest.mark.parametrize("width", [1, 7, 8, 9, 29, 55, 56])
def test_the_largest_ones_of_every_place_do_not_touch_their_neighbours(width):
    values = [(2**width - 1) * (index % 2) for index in range(65)]
    packed = pack_bits(torch.tensor(values), width)
    assert packed.tolist() == packed_by_hand(values, width)
    assert unpack_bits(packed, 65, width).tolist() == values


def test_no_integers_take_no_bytes():
    packed = pack_bits(torch.zeros(0, dtype=torch.int64), 13)
    assert packed.shape == (0,) and unpack_bits(packed, 0, 13).shape == (0,)
