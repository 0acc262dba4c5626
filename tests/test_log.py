import pytest
import torch

from abkd import AlphaBeta, TopKTargets
from abkd.calibrations import Plain
from abkd.log import StepLog
from abkd.objective import Objective
from abkd.targets import DenseTargets
from abkd.trainer.loop import AbstractDistillationTrainer


def test_rows_at_a_temperature_of_their_own_are_logged_as_those_of_the_teacher():
    student, teacher = torch.randn(2, 40, 11, generator=torch.Generator().manual_seed(0)) * 2
    step = AbstractDistillationTrainer.step_of(Objective(Plain(AlphaBeta(0.3, 0.6), temperature=2.0)))
    tempered = TopKTargets.of_logits(teacher, 11, tail="uniform", temperature=2.0)
    logs = []
    for targets in (DenseTargets(teacher), tempered):
        log = StepLog()
        log.add_rows(DenseTargets(student), targets, torch.zeros(40).long(), 1, step)
        logs.append({name: value for name, value in log.sums.items() if value})
    assert logs[1] == pytest.approx(logs[0], rel=1e-4) and {"teacher_entropy", "mass_moved"} <= logs[0].keys()
