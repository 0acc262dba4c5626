"""The fused path over TopKTargets: no worse than plain torch, equal to the dense objective, no row of the teacher."""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from test_linear_divergence import Problem, assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abkd import InputError, Objective, kernels
from abkd.calibrations import DKD, Plain
from abkd.divergences import JSD, KINDS, AlphaBeta, ForwardKL, ReverseKL
from abkd.head import LMHead
from abkd.kernels import chunked, kept, linear_divergence, linear_loss, sides
from abkd.targets import HiddenTargets, TopKTargets

TAILS = ("lump", "uniform", "renormalise", "sampled")
TOKENS, HIDDEN, VOCAB, K = 29, 12, 211, 9


def top_k(teacher, tail, k=K, temperature=1.0):
    if tail == "sampled":
        return TopKTargets.sample(teacher, k, num_exact=3, temperature=temperature)
    return TopKTargets.of_logits(teacher, k, tail=tail, temperature=temperature)


@dataclass
class TopKProblem(Problem):
    """`Problem` whose teacher is known at k classes, made of the rounded teacher in fp64 and then rounded."""

    tail: str = "lump"

    def run(self, dtype=None, path="chunked", rows=8, frozen=()):
        made, given = self.inputs(), dtype or self.dtype
        teacher = made["teacher_hidden"].double() @ made["teacher_weight"].double().T
        targets = top_k(teacher / (self.teacher_temperature or self.temperature), self.tail)
        targets = replace(targets, temperature=self.teacher_temperature or self.temperature)
        fields = ("log_probs", "tail_log_mass", "log_weights")
        stored = {name: getattr(targets, name) for name in fields if getattr(targets, name) is not None}
        wide = torch.promote_types(self.dtype, torch.float32)  # as written; the truth reads the same numbers
        targets = replace(targets, **{name: x.to(wide).to(torch.float64) for name, x in stored.items()})
        tensors = {name: made[name].to(given, copy=True).requires_grad_() for name in ("hidden", "weight", "bias")}
        head = LMHead(tensors["weight"], tensors["bias"] if self.bias else None, self.logit_scale, self.softcap)
        weights = torch.linspace(0.1, 2, self.tokens) / max(self.tokens, 1)
        labels = {"labels": torch.arange(self.tokens) % self.vocab, "ce_weights": weights / 3} if self.ce else {}
        loss = linear_loss(
            tensors["hidden"], head, targets, divergence=self.divergence, token_weights=weights,
            temperature=self.temperature, teacher_temperature=self.teacher_temperature, path=path,
            rows=None if path == "reference" else rows, **labels,
        )  # fmt: skip
        loss.total.backward()
        found = loss._asdict() | {f"{name} gradient": x.grad for name, x in tensors.items() if x.grad is not None}
        found["total"] = found["total"].detach().view(1)
        return {name: x for name, x in found.items() if self.ce or name != "cross_entropy"}


SETTINGS = {
    "plain": {},
    "forward KL": {"divergence": ForwardKL()},
    "reverse KL": {"divergence": ReverseKL()},
    "JSD": {"divergence": JSD()},
    "squared Euclid": {"divergence": AlphaBeta(1.0, 1.0)},
    "peaked": {"scale": 12.0},
    "everything on the head": {"logit_scale": 1.5, "softcap": 3.0, "bias": True, "scale": 2.0},
    "two temperatures": {"temperature": 2.0, "teacher_temperature": 0.5},
    "cross-entropy": {"ce": True},
    "cross-entropy at a temperature": {"ce": True, "temperature": 3.0, "bias": True},
    "one token": {"tokens": 1},
    "bf16": {"dtype": torch.bfloat16},
}
INFINITE = {("reverse KL", "renormalise")}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tail", TAILS)
def test_no_worse_than_plain_torch(tail, name):
    if (name, tail) in INFINITE:
        return
    problem = TopKProblem(tail=tail, **SETTINGS[name])
    truth = problem.run(torch.float64, "reference")
    assert_no_worse(problem.run(), problem.run(path="reference"), truth, floor=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["lump", "uniform"])
def test_every_divergence_of_the_table_in_fp64(tail, kind):
    problem = TopKProblem(KINDS[kind](), tail=tail, dtype=torch.float64, tokens=11)
    for name, truth in problem.run(path="reference").items():
        torch.testing.assert_close(problem.run()[name], truth, rtol=1e-9, atol=1e-12)


def models(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (TOKENS, VOCAB))
    hidden, weight, teacher = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), 3 * teacher


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tail", TAILS)
def test_fused_equals_dense_objective(tail, seed):
    hidden, weight, teacher = models(seed, torch.float32)
    labels = torch.arange(TOKENS)
    objective = Objective(Plain(AlphaBeta(), 2.0, temperature_gradient_scale="squared"), kd_weight=0.7, ce_weight=0.3)
    targets = top_k(teacher, tail, temperature=2.0)
    found = []
    for loss in (
        objective(student_logits=hidden @ weight.T, teacher_logits=targets, labels=labels, num_tokens=20),
        objective.linear(
            student_hidden=hidden, student_head=LMHead(weight), targets=targets, labels=labels, num_tokens=20
        ),
    ):
        found.append([*(x.detach() for x in loss), *torch.autograd.grad(loss.total, (hidden, weight))])
    for dense, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, dense, rtol=2e-5, atol=2e-6)


def test_the_whole_vocabulary_kept_is_the_dense_teacher():
    hidden, weight, teacher = models()
    weights = {"divergence": AlphaBeta(), "token_weights": torch.ones(TOKENS)}
    hidden_targets = HiddenTargets(teacher, LMHead(torch.eye(VOCAB, dtype=torch.float64)))
    truth = linear_divergence(hidden, LMHead(weight), hidden_targets, **weights)
    targets = TopKTargets.of_logits(teacher, VOCAB, tail="lump")
    found = linear_divergence(hidden, LMHead(weight), targets, **weights)
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, true)
    torch.testing.assert_close(*(torch.autograd.grad(loss.total, weight)[0] for loss in (found, truth)))


class Largest(TorchDispatchMode):
    """The most elements of a tensor made while open."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("tail", TAILS)
def test_no_tensor_has_all_tokens_and_classes(tail):
    hidden, weight, teacher = models()
    targets = top_k(teacher, tail)
    largest = {}
    for path, rows in (("chunked", 8), ("reference", None)):
        with Largest() as seen:
            loss = linear_loss(
                hidden, LMHead(weight), targets, divergence=AlphaBeta(), token_weights=torch.ones(TOKENS), path=path,
                rows=rows,
            )  # fmt: skip
            loss.total.backward()
        largest[path] = seen.elements
    assert largest["chunked"] == max(8 * VOCAB, VOCAB * HIDDEN)
    assert largest["reference"] == TOKENS * VOCAB


@pytest.mark.parametrize("tail", ["lump", "renormalise", "sampled"])
def test_the_teacher_takes_no_buffer_of_a_chunk_either(tail):
    side = sides.MadeRows(top_k(models()[2], tail), AlphaBeta(), torch.float32)
    assert side.logits(3, 11).shape == (8, 0)
    assert side.kept(3, 11).ids.shape[0] == 8


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck_of_the_fused_path(tail):
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (7, 2)))
    targets = top_k(torch.randn(3, 7, dtype=torch.float64), tail, k=4)
    each = torch.linspace(0.1, 1, 3)

    def total(hidden, weight):
        weights = {"token_weights": each, "labels": torch.arange(3), "ce_weights": each}
        head = LMHead(weight, softcap=3.0)
        return linear_loss(
            hidden, head, targets, divergence=AlphaBeta(0.6, 0.3), path="chunked", rows=2, **weights
        ).total

    assert torch.autograd.gradcheck(total, (hidden, weight))


def test_blocks_change_nothing(monkeypatch):
    whole = TopKProblem(ce=True).run()
    monkeypatch.setattr(kept, "_BLOCK", 1)
    for name, found in TopKProblem(ce=True).run().items():
        torch.testing.assert_close(found, whole[name], rtol=2e-5, atol=1e-8)


def test_uniform_goes_through_the_compiled_step_and_the_others_say_why_not(monkeypatch, caplog):
    steps = []
    choose = chunked._choose_step
    monkeypatch.setattr(chunked, "_choose_step", lambda *a, **k: (steps.append(choose(*a, **k)), steps[-1])[1])
    monkeypatch.setattr(kernels, "_said", set())
    hidden, weight, teacher = models(dtype=torch.float32)
    with caplog.at_level("INFO", logger="abkd"):
        for tail in ("uniform", "lump"):
            linear_divergence(
                hidden, LMHead(weight), top_k(teacher, tail), divergence=AlphaBeta(), token_weights=torch.ones(TOKENS)
            )
    assert steps[0] in (chunked.native_step, chunked.torch_step) and steps[1] is chunked.top_k_step
    assert "chunked, in torch: the teacher is known at k classes, tail=lump" in caplog.text


@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalise"])
@pytest.mark.parametrize("divergence", [AlphaBeta(), ForwardKL()], ids=str)
def test_a_rest_of_mass_0_gives_the_limits(tail, divergence):
    """The teacher forbids all but the kept classes: nothing is left out, and a lumped rest only changes the degree."""
    hidden, weight, teacher = models(dtype=torch.float32)
    teacher[:, 40:] = -math.inf
    targets = TopKTargets.of_logits(teacher, 40, tail=tail)
    weights = {"divergence": divergence, "token_weights": torch.ones(TOKENS)}
    found = linear_divergence(hidden, LMHead(weight), targets, **weights)
    truth = divergence(student=(hidden @ weight.T).log_softmax(-1), teacher=teacher.log_softmax(-1))
    gradients = [torch.autograd.grad(x, weight)[0] for x in (found.total, truth.sum())]
    assert gradients[0].isfinite().all()
    if tail != "lump" or divergence == ForwardKL():
        torch.testing.assert_close(found.divergence, truth.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 2.0}, "teacher_temperature is 2.0, and these top-k targets were made at 1.0"),
        (
            {"teacher_temperature": 0.5},
            "teacher_temperature is 0.5, .*; use teacher_temperature=1.0, or make them again",
        ),
        ({"path": "triton"}, "path=triton: .*"),
        ({"group": object()}, "group: top-k targets hold classes of the whole vocabulary"),
        ({"divergence": KINDS["akl"]()}, "tail=sampled weighs classes, and akl is no sum over classes"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, teacher = models(dtype=torch.float32)
    arguments = {"student_hidden": hidden, "student_head": LMHead(weight), "targets": top_k(teacher, "sampled")}
    arguments |= {"divergence": AlphaBeta(), "token_weights": torch.ones(TOKENS)}
    with pytest.raises(InputError, match=message):
        linear_loss(**(arguments | change))


def test_triton_names_the_tail(monkeypatch):
    monkeypatch.setattr(chunked.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, weight, teacher = models(dtype=torch.float32)
    with pytest.raises(InputError, match="path=triton: the teacher is known at k classes, tail=lump; use path=auto"):
        linear_loss(
            hidden, LMHead(weight), top_k(teacher, "lump"), divergence=AlphaBeta(), token_weights=torch.ones(TOKENS),
            path="triton",
        )  # fmt: skip


def test_the_dense_objective_refuses_what_top_k_cannot_give():
    hidden, weight, teacher = models(dtype=torch.float32)
    given = {"student_logits": hidden @ weight.T, "labels": torch.arange(TOKENS), "num_tokens": TOKENS}
    targets = top_k(teacher, "lump")
    with pytest.raises(InputError, match=re.escape("the calibration dkd compares whole rows of logits")):
        Objective(DKD())(teacher_logits=targets, **given)
    with pytest.raises(InputError, match=r"teacher_temperature is 4\.0, and these top-k targets were made at"):
        Objective(Plain(ForwardKL(), 4.0))(teacher_logits=targets, **given)
    with pytest.raises(
        InputError, match=re.escape("top-k targets (29, 211) and student (29, 210) must have one shape")
    ):
        Objective(ForwardKL())(teacher_logits=targets, **(given | {"student_logits": given["student_logits"][:, 1:]}))
