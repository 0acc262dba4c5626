"""No path may be worse than plain torch: truth is fp64 on the rounded inputs, the yardstick is `reference`."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from abkd import InputError, kernels
from abkd.divergences import JSD, KINDS, AlphaBeta, Divergence, ForwardKL, ReverseKL
from abkd.head import LMHead
from abkd.kernels import chunked, linear_divergence, linear_loss, native
from abkd.kernels import sides as sides_of
from abkd.targets import DenseTargets, HiddenTargets

STEPS = {"native": chunked.native_step, "torch": chunked.torch_step, "autograd": chunked.autograd_step}
HAS_COMPILER = not isinstance(native.library(), str)


@dataclass
class Problem:
    """Inputs of `linear_loss` and what comes out of it."""

    divergence: Divergence = field(default_factory=AlphaBeta)
    dtype: torch.dtype = torch.float32
    tokens: int = 37
    hidden: int = 16
    vocab: int = 503
    scale: float = 1.0
    agree: bool = False
    bias: bool = False
    logit_scale: float | None = None
    softcap: float | None = None
    temperature: float = 1.0
    teacher_temperature: float | None = None
    dense: bool = False
    ce: bool = False
    device: str = "cpu"

    def inputs(self):
        torch.manual_seed(1)
        shapes = {"hidden": (self.tokens, self.hidden), "weight": (self.vocab, self.hidden), "bias": (self.vocab,)}
        shapes |= {"teacher_hidden": (self.tokens, 24), "teacher_weight": (self.vocab, 24)}
        made = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
        made["weight"] *= self.scale / math.sqrt(self.hidden)
        made["teacher_weight"] *= self.scale / math.sqrt(24)
        if self.agree:
            made["teacher_hidden"] = torch.nn.functional.pad(made["hidden"], (0, 24 - self.hidden))
            made["teacher_weight"] = torch.nn.functional.pad(made["weight"], (0, 24 - self.hidden))
            made["teacher_weight"] = made["teacher_weight"] + 0.05 * torch.randn_like(made["teacher_weight"])
        return {name: tensor.to(self.dtype) for name, tensor in made.items()}

    def run(self, dtype=None, path="chunked", rows=8, frozen=()):
        """Everything that comes out: values, then gradients."""
        tensors = {name: x.to(self.device, dtype or self.dtype, copy=True) for name, x in self.inputs().items()}
        student = [name for name in ("hidden", "weight", "bias") if name not in frozen]
        for name in student:
            tensors[name].requires_grad_()
        head = LMHead(tensors["weight"], tensors["bias"] if self.bias else None, self.logit_scale, self.softcap)
        targets = HiddenTargets(tensors["teacher_hidden"], LMHead(tensors["teacher_weight"]))
        if self.dense:
            targets = DenseTargets(targets.logits(0, self.tokens))
        weights = torch.linspace(0.1, 2, self.tokens, device=self.device) / max(self.tokens, 1)
        classes = torch.arange(self.tokens, device=self.device) % self.vocab
        labels = {"labels": classes, "ce_weights": weights / 3} if self.ce else {}
        loss = linear_loss(
            tensors["hidden"],
            head,
            targets,
            divergence=self.divergence,
            token_weights=weights,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            path=path,
            rows=None if path == "reference" else rows,
            **labels,
        )
        loss.total.backward()
        found = loss._asdict() | {f"{name} gradient": tensors[name].grad for name in student}
        found["total"] = found["total"].detach().view(1)
        return {name: x for name, x in found.items() if x is not None and (self.ce or name != "cross_entropy")}


def relative_error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


def assert_no_worse(found, yardstick, truth, floor=2e-6):
    """error(ours) <= 2 * error(reference) + floor in relative L2, for everything; the bar itself is checked first."""
    assert found.keys() == yardstick.keys() == truth.keys()
    for name, true in truth.items():
        bound = 2 * relative_error(yardstick[name], true) + floor
        assert relative_error(torch.zeros_like(true), true) > bound, f"{name}: zeros would pass"
        assert relative_error(1.05 * true, true) > bound, f"{name}: five percent more would pass"
        assert relative_error(found[name], true) <= bound, name


def test_the_bar_refuses_zeros_and_five_percent():
    truth = {"x": torch.randn(9, dtype=torch.float64)}
    for wrong in (torch.zeros(9), 1.05 * truth["x"]):
        with pytest.raises(AssertionError):
            assert_no_worse({"x": wrong}, truth, truth)
    with pytest.raises(AssertionError, match="zeros would pass"):
        assert_no_worse(truth, {"x": torch.zeros(9)}, truth)


@pytest.fixture(params=STEPS)
def step(request, monkeypatch):
    """Each way to do the elementwise work; where the divergence is not of the family only autograd can."""
    if request.param == "native" and not HAS_COMPILER:
        pytest.skip(native.library())
    chosen = chunked._choose_step

    def choose(plan, dtype, *arguments, **options):
        normal = chosen(plan, dtype, *arguments, **options)
        if normal is chunked.autograd_step or (request.param == "native" and dtype == torch.float64):
            return normal
        return STEPS[request.param]

    monkeypatch.setattr(chunked, "_choose_step", choose)
    return request.param


PROBLEMS = {
    "plain": Problem(),
    "forward KL": Problem(ForwardKL()),
    "reverse KL": Problem(ReverseKL()),
    "a limit line": Problem(AlphaBeta(0.5, -0.5)),
    "beyond the square": Problem(AlphaBeta(1.2, -0.1)),
    "beside a limit line": Problem(AlphaBeta(1e-9, 0.7)),
    "agreeing": Problem(agree=True, hidden=16),
    "peaked": Problem(scale=12.0),
    "cohere": Problem(logit_scale=0.25, bias=True),
    "gemma": Problem(softcap=2.0, scale=3.0),
    "everything on the head": Problem(logit_scale=1.5, softcap=3.0, bias=True, scale=2.0),
    "temperature": Problem(temperature=2.0),
    "two temperatures": Problem(temperature=2.0, teacher_temperature=0.5),
    "dense targets": Problem(dense=True),
    "cross-entropy": Problem(ce=True),
    "cross-entropy at a temperature": Problem(ce=True, temperature=3.0, bias=True),
    "one token": Problem(tokens=1),
    "two classes": Problem(vocab=2),
    "more classes than a tile": Problem(vocab=4999, tokens=5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_worse_than_plain_torch(name, dtype, step):
    problem = replace(PROBLEMS[name], dtype=dtype)
    truth = problem.run(torch.float64, "reference")
    assert_no_worse(
        problem.run(), problem.run(path="reference"), truth, floor=1e-12 if dtype == torch.float64 else 3e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_of_the_table(kind):
    problem = Problem(KINDS[kind]())
    assert_no_worse(problem.run(), problem.run(path="reference"), problem.run(torch.float64, "reference"))


@pytest.mark.parametrize("inside", [AlphaBeta(), JSD()], ids=str)
def test_bf16_gradients_are_as_good_as_their_dtype(inside):
    problem = Problem(inside, torch.bfloat16, tokens=64, hidden=128, vocab=4096, scale=3.0)
    truth, found = problem.run(torch.float64, "reference"), problem.run(rows=24)
    for name in ("hidden gradient", "weight gradient"):
        assert relative_error(found[name], truth[name]) < 3e-3


@pytest.mark.parametrize("rows", [1, 7, 8, 37, 1000])
def test_the_chunk_changes_nothing(rows):
    whole, found = Problem(ce=True).run(rows=37), Problem(ce=True).run(rows=rows)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=2e-5, atol=1e-8)


def test_no_token_gives_an_attached_zero():
    for path in ("reference", "chunked"):
        found = Problem(tokens=0, ce=True, bias=True).run(path=path)
        assert found["total"] == 0 and found["hidden gradient"].shape == (0, 16)
        assert found["weight gradient"].abs().max() == 0


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("weight", "hidden", "bias")])
def test_nothing_is_computed_for_what_is_frozen(frozen, monkeypatch):
    sides = []
    original = sides_of.Side.__init__
    monkeypatch.setattr(
        sides_of.Side, "__init__", lambda self, *a, **k: (original(self, *a, **k), sides.append(self))[0]
    )
    problem = Problem(bias=True)
    if len(frozen) == 3:
        with pytest.raises(RuntimeError, match="does not require grad"):
            problem.run(frozen=frozen)
    else:
        full = problem.run()
        found = problem.run(frozen=frozen)
        for name in set(found):
            torch.testing.assert_close(found[name], full[name])
    student = sides[-2]
    assert [student.hidden_grad is None, student.weight_grad is None, student.bias_grad is None] == [
        name in frozen for name in ("hidden", "weight", "bias")
    ]
    assert sides[-1].weight_grad is None


@pytest.mark.parametrize("divergence", [AlphaBeta(), JSD()], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck_of_student_and_teacher(divergence, dense):
    shapes = ((5, 3), (7, 3), (7,), (5, 7) if dense else (5, 4), (7, 4))
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def total(hidden, weight, bias, teacher, teacher_weight):
        targets = DenseTargets(teacher) if dense else HiddenTargets(teacher, LMHead(teacher_weight, softcap=2.0))
        head = LMHead(weight, bias, 0.5, 3.0)
        weights = torch.linspace(0.1, 1, 5)
        return linear_loss(
            hidden, head, targets, divergence=divergence, token_weights=weights, path="chunked", rows=2
        ).total

    assert torch.autograd.gradcheck(total, [*tensors[:4], tensors[4].requires_grad_(not dense)])


def test_forbidden_classes_give_the_limits_of_the_divergence():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    teacher = torch.randn(6, 9)
    teacher[:, 2] = -math.inf
    teacher[4] = torch.where(torch.arange(9) == 3, 0.0, -math.inf)  # one-hot
    for divergence in (AlphaBeta(), ForwardKL(), ReverseKL(), JSD()):
        found = {}
        for path in ("reference", "chunked"):
            loss = linear_divergence(
                hidden,
                LMHead(weight),
                DenseTargets(teacher),
                divergence=divergence,
                token_weights=torch.ones(6),
                path=path,
            )
            found[path] = loss.divergence, *torch.autograd.grad(loss.total, (hidden, weight))
        for ours, reference in zip(found["chunked"], found["reference"], strict=True):
            torch.testing.assert_close(ours, reference)
            assert not ours.isnan().any()


def test_nan_is_not_hidden():
    problem = Problem()
    hidden, head = problem.inputs()["hidden"], LMHead(problem.inputs()["weight"])
    hidden[3, 2] = math.nan
    targets = DenseTargets(torch.randn(problem.tokens, problem.vocab))
    loss = linear_divergence(hidden, head, targets, divergence=AlphaBeta(), token_weights=torch.ones(problem.tokens))
    assert loss.divergence.isnan().nonzero().tolist() == [[3]]
    assert loss.total.isnan()


def small():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    return hidden, weight, DenseTargets(torch.randn(6, 9))


def total_of(hidden, weight, targets, factor=1.0):
    weights = torch.full((6,), factor)
    return linear_divergence(hidden, LMHead(weight), targets, divergence=AlphaBeta(), token_weights=weights).total


def test_backward_twice_raises_as_torch_does():
    total = total_of(*small())
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_a_kept_graph_gives_the_same_gradient_again_whatever_the_factor():
    hidden, weight, targets = small()
    total = total_of(hidden, weight, targets)
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(3 * total, (hidden, weight))
    for ours, once in zip(second, kept, strict=True):
        torch.testing.assert_close(ours, 3 * once)


def test_accumulation_adds_up_and_a_tied_weight_gets_both_gradients():
    hidden, weight, targets = small()
    embedded = weight[torch.tensor([1, 1, 4, 0, 2, 8])]  # the weight is used twice, as with tied embeddings
    total_of(hidden + embedded, weight, targets).backward()
    ours, weight.grad = weight.grad, None
    hidden = hidden.detach().requires_grad_()
    logits = (hidden + weight[torch.tensor([1, 1, 4, 0, 2, 8])]) @ weight.T
    AlphaBeta()(student=logits.log_softmax(-1), teacher=targets.values.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(ours, weight.grad)
    for _ in range(2):
        total_of(hidden, weight, targets, factor=0.5).backward()
    weight.grad.sub_(ours)
    whole = torch.autograd.grad(total_of(hidden, weight, targets), weight)[0]
    torch.testing.assert_close(weight.grad, whole)


def test_autocast_around_it_changes_nothing_but_the_hidden_states():
    hidden, weight, targets = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = total_of(hidden, weight, targets)
    assert inside == total_of(hidden, weight, targets)
    half = total_of(hidden.bfloat16(), weight, targets)
    assert half.dtype == torch.float32
    half.backward()
    assert hidden.grad.dtype == torch.float32 and weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("default:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_checkpointing_and_a_compiled_model_around_it():
    hidden, weight, targets = small()
    body = torch.nn.Linear(4, 4)
    plain = torch.autograd.grad(total_of(body(hidden), weight, targets), [weight, *body.parameters()])

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)

    compiled = torch.compile(lambda x: total_of(body(x), weight, targets), backend="eager")
    for total in (total_of(checkpointed(hidden), weight, targets), compiled(hidden)):
        for ours, expected in zip(torch.autograd.grad(total, [weight, *body.parameters()]), plain, strict=True):
            torch.testing.assert_close(ours, expected)


def test_without_a_gradient_only_values_are_made():
    hidden, weight, targets = small()
    with torch.no_grad():
        total = total_of(hidden, weight, targets)
    assert not total.requires_grad


def test_the_triple_and_its_meaning():
    hidden, weight, targets = small()
    total, divergence, entropy = linear_divergence(
        hidden, LMHead(weight), targets, divergence=AlphaBeta(), token_weights=torch.arange(6.0)
    )
    q, p = (hidden @ weight.T).log_softmax(-1), targets.values.log_softmax(-1)
    torch.testing.assert_close(divergence, AlphaBeta()(student=q, teacher=p).detach())
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=q).entropy().detach())
    torch.testing.assert_close(total, (torch.arange(6.0) * divergence).sum())
    assert total.requires_grad and not divergence.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"student_hidden": torch.randn(6, 5)},
            r"student_hidden must be \[N, 4\] for the student's head, got \(6, 5\)",
        ),
        ({"targets": DenseTargets(torch.randn(5, 9))}, "targets are of 5 tokens and 9 classes, the student of 6 and 9"),
        ({"targets": DenseTargets(torch.randn(6, 8))}, "targets are of 6 tokens and 8 classes, the student of 6 and 9"),
        ({"token_weights": torch.ones(6, 1)}, r"token_weights must be \[N\] = \[6\], got \(6, 1\)"),
        ({"temperature": 0.0}, "temperature must be above 0, between 1e-6 and 1e6, got 0.0"),
        ({"path": "fast"}, "path must be one of auto, reference, chunked, triton, got 'fast'"),
        ({"labels": torch.zeros(6, dtype=torch.long)}, "labels and ce_weights go together"),
        ({"labels": torch.full((6,), 9), "ce_weights": torch.ones(6)}, "labels must lie between 0 and 8"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, targets = small()
    arguments = {"student_hidden": hidden, "student_head": LMHead(weight), "targets": targets}
    arguments |= {"divergence": AlphaBeta(), "token_weights": torch.ones(6)}
    with pytest.raises(InputError, match=message):
        linear_loss(**(arguments | change))


def test_a_machine_without_a_compiler_says_so_and_works(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert "no-such-compiler" in native.library()

        kernels._said.clear()
        with caplog.at_level("INFO", logger="abkd"):
            total_of(*small()).backward()
            total_of(*small()).backward()
        assert len(caplog.records) == 1 and "chunked, in torch: rows.c cannot be built" in caplog.text
    finally:
        native.library.cache_clear()


def test_memory_grows_with_the_chunk_and_not_with_the_tokens():
    cpu = torch.device("cpu")
    head = LMHead(torch.empty(50_304, 8, device="meta"))
    assert chunked.chunk_rows(10**6, head, AlphaBeta(), cpu) == 312
    assert chunked.chunk_rows(100, head, AlphaBeta(), cpu) == 100
    assert chunked.chunk_rows(10**6, head, JSD(), cpu) < 100
    assert chunked.chunk_rows(10**6, LMHead(torch.empty(10**7, 1, device="meta")), AlphaBeta(), cpu) == 8
