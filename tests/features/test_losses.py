import pytest
import torch

from abkd.features import CRD, ITRD
from abkd.features.losses import unit


@pytest.mark.parametrize("method", [CRD, ITRD])
def test_the_seed_decides_the_initial_state_and_the_global_one_stays(method):
    before = torch.get_rng_state()
    options = {"negatives": "all"} if method is CRD else {}
    first, second, other = (method(seed=seed, **options).build(3, 4, num_examples=5).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_unit_is_the_row_at_length_one():
    row = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit(row), torch.nn.functional.normalize(row))
    assert torch.autograd.gradcheck(unit, (row,))


def test_unit_of_zeros_is_zeros_with_zero_gradient():
    row = torch.randn(3, 5)
    row[1] = 0.0
    row.requires_grad_()
    gradient = torch.autograd.grad(unit(row), row, grad_outputs=torch.randn(3, 5))[0]
    assert unit(row)[1].abs().max() == 0 and gradient[1].abs().max() == 0
    assert gradient[[0, 2]].abs().min() > 0


def test_unit_sees_no_scale_however_large_or_small():
    row = torch.randn(3, 5)
    for scale in (1e-37, 1e-25, 1e25, 1e37):
        torch.testing.assert_close(unit(scale * row), unit(row))
