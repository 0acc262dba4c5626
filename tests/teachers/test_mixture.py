"""Several teachers as one: p = sum_i w_i p_i, by hand in fp64."""

import pytest
import torch
from conftest import make_gpt2, make_llama

from abkd import InProcessTeacher, InputError, MixtureTeacher
from abkd.head import completion_logits
from abkd.targets import HiddenTargets

VOCAB = 40


def batch():
    input_ids = torch.randint(2, VOCAB - 3, (3, 9))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3:7], mask[1, 2:5], mask[2, 7] = True, True, True
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "mask": mask}


def mixed_by_hand(models, weights, inputs, vocab=VOCAB):
    rows = [completion_logits(model, **inputs)[:, :vocab].double().softmax(-1) for model in models]
    return sum(weight / sum(weights) * row for weight, row in zip(weights, rows, strict=True)).log()


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("weights", [(), (1.0, 3.0), (2.0, 2e-6)])
def test_it_is_the_weighted_mean_of_the_distributions(weights, remember):
    models, inputs = [make_llama(VOCAB), make_gpt2(VOCAB)], batch()
    teacher = MixtureTeacher([InProcessTeacher(model, remember=remember) for model in models], weights)
    assert teacher.vocab == VOCAB and len(teacher.parts) == 2 and teacher.model is None
    truth = mixed_by_hand(models, weights or (1.0, 1.0), inputs)
    for _ in range(2):
        targets = teacher.targets(**inputs, example_ids=torch.tensor([4, 8, 2]))
        assert targets.shape == truth.shape and targets.tensors == []
        torch.testing.assert_close(targets.logits(0, 8).double(), truth, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.logits(2, 5), targets.logits(0, 8)[2:5])
        logits = teacher.logits(**inputs, example_ids=torch.tensor([4, 8, 2]))
        torch.testing.assert_close(logits, targets.logits(0, 8))
        assert not logits.requires_grad


def test_rows_of_unlike_lengths_get_that_of_the_shortest():
    models, inputs = [make_llama(VOCAB + 8), make_llama(VOCAB, seed=1)], batch()
    wide = [make_llama(VOCAB + 8), make_llama(VOCAB, seed=1)]
    teacher = MixtureTeacher([InProcessTeacher(model) for model in models])
    assert teacher.vocab == VOCAB
    found = teacher.logits(**inputs, example_ids=torch.arange(3))
    torch.testing.assert_close(found.double(), mixed_by_hand(wide, (1, 1), inputs), rtol=0, atol=1e-5)
    teacher.narrow(VOCAB - 3)
    found = teacher.logits(**inputs, example_ids=torch.arange(3))
    truth = mixed_by_hand(wide, (1, 1), inputs, VOCAB - 3)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)
    teacher.narrow(VOCAB)  # never wider again
    assert teacher.vocab == VOCAB - 3


def test_a_mixture_of_one_is_that_one():
    model, inputs = make_llama(VOCAB), batch()
    alone = InProcessTeacher(model)
    targets = MixtureTeacher([alone]).targets(**inputs, example_ids=torch.arange(3))
    truth = alone.targets(**inputs, example_ids=torch.arange(3))
    assert isinstance(truth, HiddenTargets)
    torch.testing.assert_close(targets.logits(0, 8), truth.logits(0, 8).log_softmax(-1))


def test_what_does_not_fit_is_refused():
    teachers = [InProcessTeacher(make_llama(VOCAB)), InProcessTeacher(make_llama(VOCAB))]
    with pytest.raises(InputError, match="a mixture needs one at least"):
        MixtureTeacher([])
    with pytest.raises(InputError, match="weights: 3 of them for 2 teachers; give one for each"):
        MixtureTeacher(teachers, (1, 2, 3))
    with pytest.raises(InputError, match=r"weights must be above 0, got \[1, 0\]"):
        MixtureTeacher(teachers, (1, 0)).targets(**batch(), example_ids=torch.arange(3))
