"""Rows of a teacher as bytes: the error that is stated, the size that is stated, and samples that stay unbiased."""

import math

import pytest
import torch

from abkd import InputError
from abkd.divergences import ForwardKL
from abkd.targets import TopKTargets
from abkd.teachers.cache.encoding import RANGE, DenseEncoding, KeptEncoding

ROUNDING = 2e-5  # of fp32, where numbers reach 32
VOCAB = 61


def rows(kind, vocab=VOCAB, num_rows=40):
    """Logits in fp64."""
    logits = 3 * torch.randn(num_rows, vocab, dtype=torch.float64)
    match kind:
        case "peaked":  # p = 1 - 1e-9
            p = logits.softmax(-1) * 1e-9
            p[:, 3] = 1 - 1e-9
            return p.log()
        case "one-hot":
            return torch.full_like(logits, -math.inf).index_fill(1, torch.tensor(2), 0.0)
        case "flat":
            return torch.zeros_like(logits)
        case "nearly flat":
            return 1e-3 * logits
        case "forbidden":
            return logits.masked_fill(torch.rand(logits.shape) < 0.7, -math.inf).index_fill(1, torch.tensor(0), 0.0)
        case "wide":  # far below e^-32
            return 12 * logits
    return logits


def read_back(encoding, targets, tail="lump"):
    return encoding.decode(encoding.encode(targets), tail, targets.temperature)


def log_probs_of(targets):
    """`[N, vocab]`, -inf where a class is not kept."""
    nothing = torch.full(targets.shape, -math.inf, dtype=torch.float64)
    return nothing.scatter_reduce(-1, targets.ids.long(), targets.log_probs.double(), "amax")


@pytest.mark.parametrize("value_bits", [4, 8, 12, 15, 16])
@pytest.mark.parametrize("k", [1, 7, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("kind", ["random", "peaked", "one-hot", "flat", "nearly flat", "forbidden", "wide"])
def test_the_error_is_within_the_stated_one(kind, k, value_bits):
    encoding = KeptEncoding(VOCAB, value_bits)
    step = RANGE / (2**value_bits - 1)
    assert encoding.step == step
    targets = TopKTargets.of_logits(rows(kind), k, tail="lump")
    found = read_back(encoding, targets)
    truth, read = log_probs_of(targets), log_probs_of(found)
    is_large = truth >= -RANGE
    assert (read[is_large] - truth[is_large]).abs().max() <= step + ROUNDING
    assert (read[~is_large] == -math.inf).all()
    mass = torch.cat([found.log_probs, found.tail_log_mass.unsqueeze(-1)], -1).double().exp().sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
    rest = truth.masked_fill(is_large, -math.inf).logsumexp(-1)
    rest = torch.logaddexp(rest, targets.tail_log_mass.double())
    known = rest > -RANGE
    assert (found.tail_log_mass[known].double() - rest[known]).abs().le(step + ROUNDING).all()
    assert (found.tail_log_mass[rest == -math.inf] == -math.inf).all()
    assert (found.tail_log_mass[~known] <= -RANGE + step + ROUNDING).all()


def test_the_stated_error_is_not_far_above_the_largest():
    targets = TopKTargets.of_logits(rows("random", num_rows=2000), VOCAB, tail="lump")
    off = (log_probs_of(read_back(KeptEncoding(VOCAB, 8), targets)) - log_probs_of(targets)).abs()
    step = KeptEncoding(VOCAB, 8).step
    assert off.nan_to_num(0.0).max() > 0.6 * step


@pytest.mark.parametrize("vocab, k", [(2, 1), (2, 2), (1, 1), (257, 256), (70_001, 33)])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_small_and_large_vocabularies_and_few_tokens(vocab, k, num_rows):
    targets = TopKTargets.of_logits(rows("random", vocab, num_rows), k, tail="lump", temperature=2.0)
    encoding = KeptEncoding(vocab)
    found = read_back(encoding, targets)
    assert found.shape == (num_rows, vocab) and found.temperature == 2.0 and found.tail == "lump"
    if num_rows:
        assert found.ids.long().equal(targets.ids)
        assert (found.log_probs - targets.log_probs).abs().max() <= encoding.step + ROUNDING


def test_rows_of_unlike_numbers_of_classes():
    targets = TopKTargets.of_logits(rows("random"), 20, tail="lump").within(0.8)
    found = read_back(KeptEncoding(VOCAB), targets)
    counts = (targets.log_probs > -math.inf).sum(-1)
    assert len(counts.unique()) > 3 and (found.log_probs > -math.inf).sum(-1).equal(counts)
    assert (log_probs_of(found) > -math.inf).equal(log_probs_of(targets) > -math.inf)


def test_an_example_is_the_same_alone_and_among_others():
    targets = TopKTargets.of_logits(rows("random"), 9, tail="lump").within(0.9)
    encoding = KeptEncoding(VOCAB)
    parts = [read_back(encoding, targets.at(slice(start, start + 8))) for start in range(0, 40, 8)]
    assert log_probs_of(TopKTargets.cat(parts)).equal(log_probs_of(read_back(encoding, targets)))


@pytest.mark.parametrize("num_draws, num_exact", [(9, 0), (9, 4), (1, 1), (255, 3), (5, 40)])
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "one-hot", "wide"])
def test_a_sample_comes_back(kind, num_draws, num_exact):
    targets = TopKTargets.sample(rows(kind), num_draws, num_exact=num_exact)
    encoding = KeptEncoding(VOCAB, 12, num_draws, num_exact)
    found = read_back(encoding, targets, "sampled")

    def entries(of):
        """Of each row class -> (ln p, ln weight)."""
        each = zip(of.ids.tolist(), of.log_probs.tolist(), of.log_weights.tolist(), strict=True)
        return [{i: (p, w) for i, p, w in zip(*row, strict=True) if p >= -RANGE - encoding.step} for row in each]

    num_weighted = 0
    for here, there in zip(entries(targets), entries(found), strict=True):
        here = {key: value for key, value in here.items() if value[0] >= -RANGE}
        assert here.keys() == there.keys()
        for key, (log_p, weight) in here.items():
            assert abs(there[key][0] - log_p) <= encoding.step + ROUNDING
            if log_p >= -20:  # where the mass of the others is far above e^-32, the least that a rest has
                assert abs(there[key][1] - weight) <= encoding.step + ROUNDING
            num_weighted += weight != 0
    assert num_weighted or num_exact or kind == "one-hot"
    exact = min(num_exact, 1)
    assert (found.log_weights[:, :exact] == 0).all()


def test_the_counts_of_a_sample_are_exact():
    """A weight is count * P(not exact) / (draws * p); of the numbers read the counts are integers that add up."""
    targets = TopKTargets.sample(rows("random"), 30, num_exact=5)
    found = read_back(KeptEncoding(VOCAB, 10, 30, 5), targets, "sampled")
    is_drawn = (found.log_probs > -math.inf) & (torch.arange(found.ids.shape[1]) >= 5)
    others = torch.logaddexp(found.log_probs.masked_fill(~is_drawn, -math.inf).logsumexp(-1), found.tail_log_mass)
    counts = 30 * (found.log_weights + found.log_probs - others.unsqueeze(-1)).exp()[is_drawn]
    torch.testing.assert_close(counts, counts.round(), atol=1e-3, rtol=0)
    assert counts.sum().item() == pytest.approx(30 * 40, rel=1e-5)


def test_the_mean_over_samples_that_were_written_is_that_of_the_dense_row():
    num_samples, encoding = 3000, KeptEncoding(VOCAB, 12, 8, 2)
    student, teacher = (torch.randn(1, VOCAB, dtype=torch.float64).expand(num_samples, -1) for _ in range(2))
    sample = TopKTargets.sample(teacher, 8, num_exact=2, generator=torch.Generator().manual_seed(3))
    values = read_back(encoding, sample, "sampled").compare(student, ForwardKL()).double()
    truth = ForwardKL()(student=student[:1].log_softmax(-1), teacher=teacher[:1].log_softmax(-1)).item()
    bar = 4 * values.std() / num_samples**0.5 + 2 * encoding.step
    assert abs(values.mean() - truth) < bar < 0.1 * truth


def tensors_bytes(encoded):
    return sum(tensor.nbytes for tensor in encoded.values())


@pytest.mark.parametrize("value_bits", [4, 12, 16])
@pytest.mark.parametrize("vocab", [2, 256, 257, 50_257])
def test_the_stated_size_is_the_largest_one(vocab, value_bits):
    for k in (1, 2, min(50, vocab)):
        encoding = KeptEncoding(vocab, value_bits)
        assert 2**encoding.id_bits >= vocab and (vocab == 2 or 2 ** (encoding.id_bits - 1) < vocab)
        targets = TopKTargets.of_logits(rows("random", vocab, 13), k, tail="lump")
        assert tensors_bytes(encoding.encode(targets)) == encoding.most_bytes(13, k)
        assert tensors_bytes(encoding.encode(targets.within(0.5))) <= encoding.most_bytes(13, k)


@pytest.mark.parametrize("num_draws, num_exact", [(1, 3), (200, 0), (7, 8)])
def test_the_stated_size_of_a_sample_is_the_largest_one(num_draws, num_exact):
    encoding, vocab = KeptEncoding(5000, 12, num_draws, num_exact), 5000
    targets = TopKTargets.sample(rows("flat", vocab, 30), num_draws, num_exact=num_exact)
    found, most = tensors_bytes(encoding.encode(targets)), encoding.most_bytes(30, num_draws + num_exact)
    assert 0.95 * most - 4 < found <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dense_rows_are_what_they_were(dtype):
    given, encoding = torch.randn(7, 5).to(dtype), DenseEncoding(5, dtype)
    encoded = encoding.encode(given)["rows"]
    assert encoded.equal(given) and encoded.nbytes == encoding.most_bytes(7)
    forbidden = given.clone().masked_fill_(given > 0, -math.inf)
    assert encoding.encode(forbidden)["rows"].equal(forbidden)


def test_a_number_that_the_type_cannot_hold_is_refused():
    given = torch.tensor([[1.0, -7e4], [-math.inf, 0.0]])
    with pytest.raises(InputError, match=r"--dtype=float16: cannot hold the teacher's 7e\+04; use float32 or bfloat16"):
        DenseEncoding(2, torch.float16).encode(given)
    assert DenseEncoding(2, torch.bfloat16).encode(given)["rows"].isfinite().sum() == 3
