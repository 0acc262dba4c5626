"""Two processes that hold the vocabulary in two pieces give what one gives that holds it whole."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from abkd import InputError
from abkd.divergences import JSD, AlphaBeta, ReverseKL
from abkd.head import LMHead
from abkd.kernels import linear_loss
from abkd.targets import HiddenTargets

VOCAB, CUT = 101, 37  # pieces of different sizes


def problem():
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "hidden": (19, 8),
        "weight": (VOCAB, 8),
        "bias": (VOCAB,),
        "teacher": (19, 6),
        "teacher_weight": (VOCAB, 6),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def run(columns, divergence, group=None, ce=True):
    """Values, hidden gradient and the gradients of weight and bias of these columns."""
    made = problem()
    hidden, weight, bias = (made[name] for name in ("hidden", "weight", "bias"))
    weight, bias = weight[columns].clone().requires_grad_(), bias[columns].clone().requires_grad_()
    hidden.requires_grad_()
    labels = {"labels": torch.arange(19) * 5, "ce_weights": torch.full((19,), 0.1)} if ce else {}
    loss = linear_loss(
        hidden,
        LMHead(weight, bias, 0.7, 4.0),
        HiddenTargets(made["teacher"], LMHead(made["teacher_weight"][columns])),
        divergence=divergence,
        token_weights=torch.linspace(0, 1, 19),
        path="chunked",
        rows=8,
        group=group,
        **labels,
    )
    loss.total.backward()
    return [loss.total.detach(), *loss[1:], hidden.grad, weight.grad, bias.grad]


def piece(rank, port, found):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        columns = slice(0, CUT) if rank == 0 else slice(CUT, None)
        group = dist.group.WORLD
        found[rank] = [run(columns, divergence, group) for divergence in (AlphaBeta(), ReverseKL())]
        try:
            run(columns, JSD(), group, ce=False)
        except InputError as error:
            found[f"refusal {rank}"] = str(error)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_pieces_equal_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(piece, (port, found), nprocs=2)
        for case, divergence in enumerate((AlphaBeta(), ReverseKL())):
            whole = run(slice(None), divergence)
            pieces = [found[0][case], found[1][case]]
            for mine, theirs, expected in zip(*pieces, whole, strict=True):
                if len(expected.shape) and len(expected) == VOCAB:
                    torch.testing.assert_close(torch.cat([mine, theirs]), expected, rtol=1e-4, atol=1e-6)
                else:
                    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
                    torch.testing.assert_close(theirs, mine)
        assert "split vocabulary takes the alpha-beta family" in found["refusal 0"]
        assert "got JSD(mix=0.5)" in found["refusal 1"]


def test_the_reference_cannot_be_split():
    made = problem()
    with pytest.raises(InputError, match="group: the reference holds the whole vocabulary; use path=chunked"):
        linear_loss(
            made["hidden"],
            LMHead(made["weight"]),
            HiddenTargets(made["teacher"], LMHead(made["teacher_weight"])),
            divergence=AlphaBeta(),
            token_weights=torch.ones(19),
            path="reference",
            group=object(),
        )
