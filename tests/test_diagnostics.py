import math
import random

import pytest

from abkd.diagnostics import Diagnosis


def said(values, **others):
    diagnosis = Diagnosis()
    lines = []
    for step, value in enumerate(values, start=1):
        logs = {"loss": value, "kd": value, "num_tokens": 9, "grad_norm": 1.0} | {k: v(step) for k, v in others.items()}
        lines += diagnosis.read(step, logs)
    return lines


def noisy(curve, length=200, noise=0.3, seed=0):
    dice = random.Random(seed)
    return [curve(step) * math.exp(dice.gauss(0, noise)) for step in range(length)]


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_falls_under_noise_raises_no_alarm(seed):
    assert said(noisy(lambda step: 1 + 3 * math.exp(-step / 20), seed=seed)) == []
    assert said(noisy(lambda step: 3 / (1 + step / 50), seed=seed)) == []


def test_a_loss_that_rises_is_said_twice_at_most():
    lines = said(noisy(lambda step: 1 + step / 100))
    assert len(lines) == 2 and lines[0].startswith("step 60: the loss term has not fallen: its mean is ")
    assert lines[1].startswith("step 120: ")


def test_a_student_that_is_the_teacher():
    (line,) = said([1e-8] * 5)
    assert line.startswith("step 1: the divergence is 1.0e-08 before any training")
    assert said([0.0] * 5, ce=lambda step: 2.0) == []
    assert said([1.0, 1e-9, 1e-9]) == []


def test_a_batch_without_a_counted_token_is_said_once():
    (line,) = said([1.0] * 9, num_tokens=lambda step: 0 if step in (3, 5) else 7)
    assert line.startswith("step 3: no token of the batch counted")


def test_a_gradient_that_vanishes_or_explodes():
    (line,) = said([1.0] * 9, grad_norm=lambda step: 0.0)
    assert line.startswith("step 1: the gradient is 0")
    (line,) = said([1.0] * 40, grad_norm=lambda step: 300.0 if step in (30, 31) else 1 + step % 3)
    assert line.startswith("step 30: the gradient norm is 300, 150 times the usual 2")
    assert said([1.0] * 40, grad_norm=lambda step: 90.0 if step == 30 else 1.0) == []


def test_lines_without_a_loss_are_passed_over():
    assert Diagnosis().read(1, {"validation_forward_kl": 0.0}) == []
