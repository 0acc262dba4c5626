"""The Triton path: on a GPU where there is one, else through Triton's interpreter; and compiled for real GPUs."""

import itertools
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_linear_divergence import PROBLEMS, Problem, assert_no_worse, relative_error

from abkd import InputError, kernels
from abkd.divergences import (
    JSD,
    KINDS,
    AlphaBeta,
    ForwardKL,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
)
from abkd.head import LMHead
from abkd.kernels import chunked, linear_divergence, linear_loss, sides
from abkd.targets import DenseTargets, HiddenTargets

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = [
    AlphaBeta(),
    ForwardKL(),
    ReverseKL(),
    AlphaBeta(0.5, -0.5),
    AlphaBeta(0.0, 0.0),
    AlphaBeta(1e-9, 0.7),
    AlphaBeta(2.0, -1.0),
    AlphaBeta(1.0, 1.0),
    JSD(),
    JSD(0.9),
    SkewedForwardKL(),
    SkewedReverseKL(),
]


@pytest.fixture
def no_way_round(monkeypatch):
    """The rows are done by the kernel, in several tiles, not handed on."""
    from abkd.kernels import triton

    monkeypatch.setattr(triton, "_BLOCK", 256)
    monkeypatch.setattr(chunked, "autograd_step", lambda chunk: pytest.fail("the kernel handed the rows on"))


def check(problem, path="triton", floor=3e-6, **options):
    truth = replace(problem, device="cpu").run(torch.float64, "reference")
    yardstick, found = problem.run(path="reference"), problem.run(path=path, **options)
    found, yardstick = ({name: x.cpu() for name, x in each.items()} for each in (found, yardstick))
    assert_no_worse(found, yardstick, truth, floor)


IN_HALF = [(name, dtype) for name in ("plain", "gemma", "dense targets") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in PROBLEMS), *IN_HALF], ids=str)
def test_no_worse_than_plain_torch(name, dtype, no_way_round):
    problem = PROBLEMS[name]
    check(replace(problem, dtype=dtype, tokens=min(problem.tokens, 5), device=DEVICE), rows=3)


@pytest.mark.parametrize("problem", [Problem(), Problem(agree=True), Problem(scale=12.0)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence_it_has(divergence, problem, no_way_round):
    check(replace(problem, divergence=divergence, tokens=3, ce=True, temperature=1.5, device=DEVICE))


@pytest.mark.parametrize("vocab", [2, 3, 2047, 2048, 2049, 151_936, 262_144])
def test_any_vocabulary(vocab, monkeypatch, no_way_round):
    if vocab > 10_000 and DEVICE == "cpu":
        from abkd.kernels import triton

        monkeypatch.setattr(triton, "_BLOCK", 2**16)  # the interpreter pays by the tile
    check(Problem(tokens=2, hidden=4, vocab=vocab, ce=True, device=DEVICE))


def test_rows_beyond_two_to_the_31_elements():
    from abkd.kernels.triton import divergence_rows

    torch.use_deterministic_algorithms(False)  # no NaN into 4 GiB: only the rows' own pages are touched
    stride, vocab = 2**30, 500
    far = torch.empty(2 * stride + vocab, dtype=torch.float16, device=DEVICE).as_strided((3, vocab), (stride, 1))
    near = torch.randn(3, vocab, device=DEVICE).half()
    far.copy_(near)
    teacher, weights = torch.randn(3, vocab, device=DEVICE), torch.ones(3, device=DEVICE)
    arguments = (teacher, weights, None, None, AlphaBeta())
    options = {"temperature": 1.0, "teacher_temperature": 1.0}
    found = [(divergence_rows(student, *arguments, **options, gradient=student), student) for student in (far, near)]
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected) and not ours.isnan().any()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_class_forbidden_to_both_adds_nothing(divergence, no_way_round):
    found = {}
    for path in ("reference", "triton"):
        hidden, weight, targets = inputs()
        bias = torch.zeros(9, device=DEVICE).index_fill_(0, torch.tensor([2, 8], device=DEVICE), -math.inf)
        targets.values[:, [2, 8]] = -math.inf
        total, *values = linear_divergence(
            hidden,
            LMHead(weight, bias),
            targets,
            divergence=divergence,
            token_weights=torch.ones(6, device=DEVICE),
            path=path,
        )
        found[path] = *values, *torch.autograd.grad(total, (hidden, weight))
    for ours, reference in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_class_forbidden_to_one_gives_the_limits(divergence, whose):
    found = {}
    for path in ("reference", "triton"):
        hidden, weight, targets = inputs()
        bias = torch.zeros(9, device=DEVICE)
        if whose == "student":
            bias[3] = -math.inf
        else:
            targets.values[:4, 3] = -math.inf
        total, *values = linear_divergence(
            hidden,
            LMHead(weight, bias),
            targets,
            divergence=divergence,
            token_weights=torch.ones(6, device=DEVICE),
            path=path,
        )
        found[path] = *values, *torch.autograd.grad(total, (hidden, weight))
    for ours, reference in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
        assert not ours.isnan().any()


def test_nan_is_not_hidden():
    hidden, weight, targets = inputs()
    targets.values[3, 2] = math.nan
    weights = torch.ones(6, device=DEVICE)
    loss = linear_divergence(
        hidden, LMHead(weight), targets, divergence=AlphaBeta(), token_weights=weights, path="triton"
    )
    assert loss.divergence.isnan().nonzero().tolist() == [[3]] and loss.total.isnan()


@pytest.mark.parametrize("inside", [AlphaBeta(), JSD()], ids=str)
@pytest.mark.parametrize("head", [{}, {"bias": True}, {"softcap": 5.0}, {"logit_scale": 0.7}], ids=str)
def test_products_of_half_factors_keep_the_accuracy_of_the_result(inside, head, monkeypatch, no_way_round):
    """On a GPU bf16 factors are multiplied as they are; here that product is emulated, its sum in fp32.

    The interpreter cuts bits off where a GPU rounds to bf16.
    """
    bound = 6e-3 if DEVICE == "cpu" and not head else 3e-3
    if DEVICE == "cpu":
        product = sides.add_product
        monkeypatch.setattr(sides, "factor_dtype", lambda *arguments: torch.bfloat16)
        monkeypatch.setattr(sides, "add_product", lambda out, a, b, keep=1: product(out, a.float(), b.float(), keep))
    monkeypatch.setattr("abkd.kernels.triton._BLOCK", 4096)
    problem = Problem(inside, torch.bfloat16, tokens=24, hidden=64, vocab=2500, scale=3.0, device=DEVICE, **head)
    truth, found = replace(problem, device="cpu").run(torch.float64, "reference"), problem.run(path="triton")
    for name in ("hidden gradient", "weight gradient"):
        assert 1e-4 < relative_error(found[name].cpu(), truth[name]) < bound
    assert relative_error(found["divergence"].cpu(), truth["divergence"]) < 2e-6


def test_no_token_gives_an_attached_zero():
    found = Problem(tokens=0, ce=True, bias=True, device=DEVICE).run(path="triton")
    assert found["total"] == 0 and found["weight gradient"].abs().max() == 0


def inputs():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 4, device=DEVICE, requires_grad=True) for n in (6, 9))
    return hidden, weight, DenseTargets(torch.randn(6, 9, device=DEVICE))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"divergence": TotalVariation()}, "path=triton: it has no total_variation; use path=auto"),
        (
            {"student_hidden": torch.randn(6, 4, dtype=torch.float64)},
            "path=triton: it computes in fp32, and the hidden",
        ),
        ({"targets": DenseTargets(torch.randn(6, 9, requires_grad=True))}, "path=triton: it gives no gradient of the"),
        (
            {"targets": HiddenTargets(torch.randn(6, 2), LMHead(torch.randn(9, 2, requires_grad=True)))},
            "path=triton: it gives no gradient of the teacher",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(change, message):
    hidden, weight, targets = inputs()
    arguments = {"student_hidden": hidden, "student_head": LMHead(weight), "targets": targets}
    arguments |= {"divergence": AlphaBeta(), "token_weights": torch.ones(6)}
    with pytest.raises(InputError, match=message):
        linear_loss(**(arguments | change), path="triton")
    linear_loss(**(arguments | change))


def test_a_machine_without_a_gpu_or_without_triton_is_named(monkeypatch):
    hidden, weight, targets = (x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs())
    targets = DenseTargets(targets.values.cpu())
    arguments = {"divergence": AlphaBeta(), "token_weights": torch.ones(6)}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="path=triton: it needs a GPU, and the tensors are on cpu; use path=auto"):
        linear_loss(hidden, LMHead(weight), targets, **arguments, path="triton")
    monkeypatch.setattr(chunked.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="path=triton: the package triton is not installed; use path=auto"):
        linear_loss(hidden, LMHead(weight), targets, **arguments, path="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_auto_takes_it_on_a_gpu_where_it_can_and_says_so(caplog):
    hidden, weight, targets = inputs()
    kernels._said.clear()
    with caplog.at_level("INFO", logger="abkd"):
        for divergence in (AlphaBeta(), JSD(), TotalVariation()):
            linear_loss(
                hidden, LMHead(weight), targets, divergence=divergence, token_weights=torch.ones(6, device=DEVICE)
            )
    assert caplog.messages[0] == "linear_divergence: triton" and "it has no total_variation" in caplog.messages[1]
    assert len(caplog.messages) == 2


def test_every_kind_is_taken_or_refused_by_name():
    from abkd.kernels.triton import local_divergence

    for kind, make in KINDS.items():
        if kind in ("alpha_beta", "forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"):
            local_divergence(make())
        else:
            with pytest.raises(ValueError, match=kind):
                local_divergence(make())


def test_it_compiles_for_a_gpu_without_spilling():
    """The interpreter takes Python that the compiler refuses: so the compiler is asked, down to machine code."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0 bytes spill stores, 0 bytes spill loads") == 4, done.stdout


def main() -> None:
    for architecture, divergence in itertools.product((80, 90), (AlphaBeta(), JSD())):
        print(assembled(architecture, divergence))


def assembled(architecture, divergence) -> str:
    """What the assembler says of the kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from abkd.kernels import triton as kernel

    local, parameters = kernel.local_divergence(divergence)
    names = kernel._rows.arg_names
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(("local", "has_labels", "block"), "constexpr")
    signature |= dict.fromkeys(("student", "teacher", "values", "weights", "ce_weights"), "*fp32")
    signature |= {"gradient": "*bf16", "labels": "*i64", "student_scale": "fp32", "teacher_scale": "fp32"}
    signature |= {"parameters": ("fp32",) * len(parameters)}
    fixed = {"local": local, "has_labels": True, "block": kernel._BLOCK}
    source = ASTSource(kernel._rows, signature, {(names.index(name),): value for name, value in fixed.items()})
    options = {"num_warps": kernel._WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        name = "sm_90a" if architecture == 90 else f"sm_{architecture}"
        command = [str(assembler), "-v", f"-arch={name}", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    main()
