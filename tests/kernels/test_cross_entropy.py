import pytest
import torch

from abkd import InputError
from abkd.head import LMHead
from abkd.kernels import linear_cross_entropy


def problem(dtype=torch.float32, bias=True, softcap=None, scale=None, count=23):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 12, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(57, 12, generator=generator).to(dtype).requires_grad_()
    offsets = torch.randn(57, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(57, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    return hidden, LMHead(weight, bias=offsets, softcap=softcap, logit_scale=scale), labels, weights


def truth(hidden, head, labels, weights):
    """fp64, all logits at once, autograd."""
    tensors = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    logits = tensors[0] @ tensors[1].T
    if tensors[2] is not None:
        logits = logits + tensors[2]
    if head.logit_scale is not None:
        logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    total = (weights.double() * values).sum()
    total.backward()
    return total, values, [None if x is None else x.grad for x in tensors]


@pytest.mark.parametrize("rows", [1, 7, 23, 100])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"softcap": 3.0}, {"scale": 0.25}], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_value_and_gradients_are_those_of_torch_in_fp64(dtype, bound, options, rows):
    hidden, head, labels, weights = problem(dtype, **options)
    total, values = linear_cross_entropy(hidden, head, labels, weights=weights, rows=rows)
    (2 * total).backward()
    expected_total, expected_values, gradients = truth(hidden, head, labels, weights)
    assert values.dtype == torch.promote_types(dtype, torch.float32) and not values.requires_grad
    assert (total - expected_total).abs() <= bound * expected_total.abs()
    assert (values - expected_values).norm() <= bound * expected_values.norm()
    for tensor, gradient in zip((hidden, head.weight, head.bias), gradients, strict=True):
        if tensor is not None:
            assert (tensor.grad / 2 - gradient).norm() <= bound * gradient.norm()


def test_what_is_frozen_gets_no_gradient():
    hidden, head, labels, weights = problem()
    head.weight.requires_grad_(False)
    linear_cross_entropy(hidden, head, labels, weights=weights).total.backward()
    assert head.weight.grad is None and head.bias.grad is not None and hidden.grad is not None


def test_without_a_token_zeros_are_attached_to_the_graph():
    hidden, head, labels, weights = problem(count=0)
    total, values = linear_cross_entropy(hidden, head, labels, weights=weights)
    total.backward()
    assert total == 0 and values.shape == (0,) and (head.weight.grad == 0).all()


def test_huge_logits_and_a_forbidden_class():
    hidden, head, labels, weights = problem(bias=True)
    head.bias.data[5] = -torch.inf
    head.weight.data *= 1e4
    labels[labels == 5] = 6
    total, values = linear_cross_entropy(hidden, head, labels, weights=weights)
    total.backward()
    assert values.isfinite().all() and hidden.grad.isfinite().all() and head.bias.grad[5] == 0


def test_what_does_not_fit_is_refused():
    hidden, head, labels, weights = problem()
    with pytest.raises(InputError, match="labels must lie between 0 and 56"):
        linear_cross_entropy(hidden, head, labels + 50, weights=weights)
    with pytest.raises(InputError, match=r"weights must be \[N\] = \[23\]"):
        linear_cross_entropy(hidden, head, labels, weights=weights[:5])
    with pytest.raises(InputError, match=r"hidden must be \[N, 12\]"):
        linear_cross_entropy(hidden[:, :5], head, labels, weights=weights)
