"""The counter of living storages, and what it says of a step."""

import pytest
import torch
from conftest import make_gpt2, make_llama

from abkd.divergences import JSD, AlphaBeta
from abkd.kernels.memory import LiveBytes, Step, step_memory

KIB = 256  # numbers of fp32


def test_the_counter_counts_storages_once_and_to_their_end():
    before = torch.zeros(KIB)
    with LiveBytes() as live:
        before.add_(1)
        view = before.view(16, 16).T
        assert (live.now, live.peak) == (0, 0)
        first = torch.zeros(2 * KIB)
        same = first[:KIB]
        second = torch.zeros(4 * KIB) + 1  # one passing and one that stays
        assert (live.now, live.peak) == (6 * 1024, 10 * 1024)
        del first
        assert live.now == 6 * 1024
        del same, view
        assert live.now == 4 * 1024
        del second
    assert (live.now, live.peak) == (0, 10 * 1024)


def test_the_counter_sees_what_a_backward_keeps_and_makes():
    x = torch.ones(KIB, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp()  # kept by its own backward
        z = y.sin()
        del y
        assert live.now == 2 * 1024
        z.sum().backward()
        del z
    assert live.now == 1024 and x.grad.numel() == KIB


VOCAB = 300


def memory(make=make_llama, *, tied=True, prepare=lambda student: student, **changes):
    def models():
        student = make(VOCAB, layers=2, tied=tied) if make is make_llama else make(VOCAB, layers=2)
        prepare(student)
        return student.train(), make(VOCAB).requires_grad_(False)

    step = Step(**({"batch_size": 4, "length": 32, "num_tokens": 100, "loss": AlphaBeta()} | changes))
    return step_memory(models, step)


def size(model):
    return 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_weights_moments_and_gradients(make):
    found, student, teacher = memory(make), make(VOCAB, layers=2), make(VOCAB)
    buffers = found.student - size(student)
    assert 0 <= buffers < 2000 and 0 <= found.teacher - size(teacher) < 2000
    assert (found.optimizer, found.gradients) == (2 * size(student), size(student))
    parts = found.student + found.teacher + found.optimizer + found.gradients + found.activations + found.loss
    assert found.student + found.teacher + found.optimizer + found.activations + found.loss < found.peak
    assert found.peak < parts + 2 * size(student)
    assert memory(make, accumulates=True).peak > found.peak


def test_without_a_teacher_its_share_is_gone():
    def alone():
        return make_llama(VOCAB, layers=2).train(), None

    found = step_memory(alone, Step(4, 32, 100, lambda student, teacher, labels: student.logsumexp(-1).mean()))
    assert found.teacher == 0 and found.peak > found.student + found.optimizer + found.activations


def test_a_frozen_head_has_no_gradient_and_an_untied_one_counts_twice():
    def freeze(student):
        student.get_input_embeddings().requires_grad_(False)

    embedding = VOCAB * 32 * 4
    tied, frozen, untied = memory(), memory(prepare=freeze), memory(tied=False)
    assert tied.gradients - frozen.gradients == embedding == untied.gradients - tied.gradients
    assert frozen.peak < tied.peak < untied.peak


def test_activations_grow_with_the_batch_and_shrink_with_checkpoints_and_half_precision():
    whole = memory()
    assert memory(batch_size=8).activations == pytest.approx(2 * whole.activations, rel=0.05)
    assert memory(prepare=lambda s: s.activation_checkpointing_enable()).activations < 0.3 * whole.activations
    assert memory(autocast=torch.bfloat16).activations < 0.9 * whole.activations


def test_dense_logits_grow_with_the_tokens_and_fused_ones_to_their_share():
    def dense(student, teacher, labels):
        return AlphaBeta()(student=student.log_softmax(-1), teacher=teacher.log_softmax(-1)).mean()

    options = {"batch_size": 4, "length": 2048}
    small, large = (memory(loss=dense, num_tokens=n, **options) for n in (4096, 8192))
    assert large.loss - small.loss > 3 * 4 * 4096 * VOCAB  # logits, and what their gradient takes
    fused = memory(loss=AlphaBeta(), num_tokens=8192, **options)
    assert fused.loss == 2 * 4 * 8192 * VOCAB < large.loss / 2
    assert memory(loss=JSD(), num_tokens=8192, **options).loss == 8 * 4 * 8192 * VOCAB
    gib = 4 * 10**6 * VOCAB
    assert memory(loss=AlphaBeta(), num_tokens=10**6, **options).loss <= 120 * 2**20 < gib


def test_nothing_is_allocated():
    def huge(*arguments, **options):
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=150_000, hidden_size=8192))

    found = step_memory(lambda: (huge(), huge()), Step(64, 4096, 64 * 4096, AlphaBeta()))
    assert found.peak > 200 * 2**30 and "GiB at its peak (student" in str(found)
