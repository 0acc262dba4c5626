import pytest
import torch

from abkd import AlphaBeta, ForwardKL, InputError, Objective
from abkd.calibrations import CALIBRATIONS, DKD, LSD, Plain
from abkd.divergences import KINDS, AlphaBetaSchedule, Ramp
from abkd.objective import completion_mask

VOCAB = 11


def rows(n=5):
    return torch.randn(n, VOCAB).double(), torch.randn(n, VOCAB).double(), torch.randint(VOCAB, (n,))


def loss_of(objective, student, teacher, labels, num_tokens):
    return objective(student_logits=student, teacher_logits=teacher, labels=labels, num_tokens=num_tokens)


def test_mask_counts_the_prediction_of_every_labelled_token():
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]])
    assert completion_mask(labels).tolist() == [[False, True, True], [True, False, False]]


def test_total_is_the_weighted_mean_of_torch_losses():
    student, teacher, labels = rows()
    loss = loss_of(Objective(ForwardKL(), kd_weight=2.0, ce_weight=0.5), student, teacher, labels, 5)
    kd = torch.nn.functional.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="sum"
    )
    ce = torch.nn.functional.cross_entropy(student.float(), labels, reduction="sum")
    torch.testing.assert_close(loss.kd_sum, kd)
    torch.testing.assert_close(loss.ce_sum, ce)
    torch.testing.assert_close(loss.total, (2.0 * kd + 0.5 * ce) / 5)


def test_micro_batches_add_up_to_the_mean_over_the_step():
    student, teacher, labels = rows(7)
    objective = Objective(AlphaBeta(), ce_weight=1.0)
    whole = loss_of(objective, student, teacher, labels, 7).total
    parts = [loss_of(objective, student[a:b], teacher[a:b], labels[a:b], 7).total for a, b in ((0, 1), (1, 5), (5, 7))]
    torch.testing.assert_close(sum(parts), whole)


def test_temperature_divides_the_logits_of_the_divergence_alone():
    student, teacher, labels = rows()
    warm = loss_of(Objective(Plain(ForwardKL(), 4.0), ce_weight=1.0), student, teacher, labels, 5)
    plain = loss_of(Objective(ForwardKL(), ce_weight=1.0), student / 4, teacher / 4, labels, 5)
    torch.testing.assert_close(warm.kd_sum, plain.kd_sum)
    torch.testing.assert_close(warm.ce_sum, loss_of(Objective(ce_weight=1.0), student, teacher, labels, 5).ce_sum)


@pytest.mark.parametrize("calibration", [*KINDS.values(), *CALIBRATIONS.values()], ids=lambda kind: kind.kind)
def test_a_fully_masked_batch_gives_an_attached_zero(calibration):
    student = torch.randn(0, VOCAB, requires_grad=True)
    objective = Objective(calibration(), ce_weight=1.0)
    loss = loss_of(objective, student, torch.randn(0, VOCAB), torch.zeros(0, dtype=torch.long), 0)
    assert loss.total == 0 and loss.total.requires_grad
    loss.total.backward()
    assert student.grad.shape == (0, VOCAB)


def test_a_term_of_weight_zero_is_not_computed():
    student, teacher, labels = rows()
    only_ce = loss_of(Objective(kd_weight=0.0, ce_weight=1.0), student, None, labels, 5)
    assert only_ce.kd_sum == 0 and only_ce.total.isfinite()
    student[0, labels[0]] = -torch.inf  # an infinite cross-entropy of weight 0 must not become NaN
    only_kd = loss_of(Objective(AlphaBeta(0.5, 0.5)), student, teacher, labels, 5)
    assert only_kd.ce_sum == 0 and only_kd.total.isfinite()


def test_half_logits_are_softmaxed_in_fp32():
    student, teacher, labels = rows()
    loss = loss_of(Objective(ForwardKL()), student.bfloat16(), teacher.bfloat16(), labels, 5)
    truth = loss_of(Objective(ForwardKL()), student.bfloat16().float(), teacher.bfloat16().float(), labels, 5)
    assert loss.total.dtype == torch.float32
    assert loss.total == truth.total


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kd_weight": -1.0}, "kd_weight must lie between 0 and 1e30, got -1.0"),
        ({"ce_weight": float("nan")}, "ce_weight must be a finite number, got nan"),
        ({"kd_weight": 0.0}, "kd_weight and ce_weight are both 0"),
        ({"kd_weight": True}, "kd_weight must be a finite number, got True"),
        ({"kd_weight": 0.0, "ce_weight": 1.0, "kd_warmup": 0.5}, "and kd_weight is 0; set kd_weight above 0"),
        ({"calibration": "forward_kl"}, "divergence must be one of abkd.divergences"),
        ({"kd_warmup": 1.5, "ce_weight": 1.0}, "kd_warmup is a share of the training, between 0 and 1, got 1.5"),
        ({"kd_warmup": 0.1}, "raises kd_weight against ce_weight, and ce_weight is 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=message):
        Objective(**options)


def test_a_schedule_is_resolved_before_the_loss():
    student, teacher, labels = rows()
    objective = Objective(AlphaBetaSchedule(Ramp(0.8, 0.2), 0.5))
    assert objective.at(1.0) == Objective(AlphaBeta(0.2, 0.5))
    assert Objective(DKD(objective.divergence)).at(1.0) == Objective(DKD(AlphaBeta(0.2, 0.5)))
    with pytest.raises(InputError, match=r"as in objective\.at\(progress\)"):
        loss_of(objective, student, teacher, labels, 5)


def test_a_bare_divergence_is_a_plain_calibration():
    assert Objective(ForwardKL()) == Objective(Plain(ForwardKL()))
    assert Objective().divergence == AlphaBeta()


def test_the_weight_of_the_divergence_warms_up_and_that_of_the_cross_entropy_does_not():
    objective = Objective(DKD(), kd_weight=2.0, ce_weight=1.0, kd_warmup=0.25)
    assert [objective.at(x).kd_weight for x in (0.0, 0.125, 0.25, 1.0)] == [0.0, 1.0, 2.0, 2.0]
    assert {objective.at(x).ce_weight for x in (0.0, 0.125, 1.0)} == {1.0}
    assert Objective(kd_weight=2.0).at(0.0).kd_weight == 2.0


def test_a_calibration_counts_as_a_mean_over_the_step():
    student, teacher, labels = rows(6)
    objective = Objective(LSD(AlphaBeta()), ce_weight=0.5)
    per_token = LSD(AlphaBeta())(student_logits=student.float(), teacher_logits=teacher.float(), labels=labels)
    loss = loss_of(objective, student, teacher, labels, 12)
    ce = torch.nn.functional.cross_entropy(student.float(), labels, reduction="sum")
    torch.testing.assert_close(loss.kd_sum, per_token.sum())
    torch.testing.assert_close(loss.total, (per_token.sum() + 0.5 * ce) / 12)
