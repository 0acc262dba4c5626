import pytest
import torch
from conftest import make_llama

from abkd import AlphaBeta, ForwardKL, InProcessTeacher, ReverseKL
from abkd.evaluation.fidelity import fidelity
from abkd.objective import completion_mask
from abkd.targets import TopKTargets

DIVERGENCES = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "alpha_beta": AlphaBeta()}
VOCAB = 30


def batches():
    """Two batches of different token counts, so that a mean of means would be wrong."""
    result, generator = [], torch.Generator().manual_seed(1)
    for number, (rows, length, counted) in enumerate([(2, 8, 5), (1, 5, 2)]):
        input_ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
        labels = input_ids.clone()
        labels[:, :-counted] = -100
        result.append(
            {
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(input_ids),
                "labels": labels,
                "example_ids": torch.arange(rows) + 10 * number,
            }
        )
    return result


def test_means_over_all_tokens_equal_torch():
    student, teacher = make_llama(VOCAB, seed=1), make_llama(VOCAB, seed=2)
    measured = fidelity(student, InProcessTeacher(teacher).targets, batches(), DIVERGENCES)
    q, p, tokens = [], [], []
    for batch in batches():
        mask = completion_mask(batch["labels"])
        q.append(student(batch["input_ids"]).logits[:, :-1][mask].detach())
        p.append(teacher(batch["input_ids"]).logits[:, :-1][mask].detach())
        tokens.append(batch["labels"][:, 1:][mask])
    q, p, tokens = torch.cat(q), torch.cat(p), torch.cat(tokens)
    kl = torch.distributions.kl_divergence
    student_row, teacher_row = (torch.distributions.Categorical(logits=x) for x in (q, p))
    assert measured["num_tokens"] == len(tokens) == 12
    assert measured["forward_kl"] == pytest.approx(kl(teacher_row, student_row).mean().item(), rel=1e-5)
    assert measured["reverse_kl"] == pytest.approx(kl(student_row, teacher_row).mean().item(), rel=1e-5)
    assert measured["token_agreement"] == (q.argmax(-1) == p.argmax(-1)).float().mean().item()
    assert measured["next_token_loss"] == pytest.approx(torch.nn.functional.cross_entropy(q, tokens).item(), rel=1e-5)


def test_a_model_is_at_no_distance_from_itself_and_keeps_its_mode():
    model = make_llama(VOCAB).train()
    twin = make_llama(VOCAB)
    measured = fidelity(model, InProcessTeacher(twin).targets, batches(), DIVERGENCES)
    assert measured["forward_kl"] == measured["reverse_kl"] == measured["alpha_beta"] == 0
    assert measured["token_agreement"] == 1
    assert model.training


def test_rows_are_handed_on_as_log_probabilities():
    seen = []
    teacher = InProcessTeacher(make_llama(VOCAB, seed=2))
    fidelity(
        make_llama(VOCAB),
        teacher.targets,
        batches(),
        DIVERGENCES,
        per_token=lambda student, teacher: seen.append((student, teacher)),
    )
    assert [len(student) for student, _ in seen] == [10, 2]
    for pair in seen:
        for rows in pair:
            torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(rows)))


def test_top_k_targets_are_compared_with_at_their_own_temperature():
    model, seen = make_llama(VOCAB), []
    teacher = InProcessTeacher(make_llama(VOCAB))

    def targets(**batch):
        return TopKTargets.of_logits(teacher.logits(**batch), VOCAB, tail="uniform", temperature=2.0)

    measured = fidelity(model, targets, batches(), DIVERGENCES, per_token=lambda *rows: seen.append(rows))
    plain = fidelity(model, teacher.targets, batches(), DIVERGENCES)
    for name in DIVERGENCES:
        assert measured[name] == pytest.approx(0, abs=1e-6)
    for name in ("next_token_loss", "entropy", "token_agreement"):
        assert measured[name] == pytest.approx(plain[name], rel=1e-6)
    for student, row in seen:
        torch.testing.assert_close(student, row)
