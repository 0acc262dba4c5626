"""CachedTeacher over caches written by hand: every kind, in any order, narrowed; heads; and what is refused."""

import math
from typing import NamedTuple

import pytest
import torch
from test_cache_manifest import make_manifest

from abkd import InputError
from abkd.head import LMHead
from abkd.targets import DenseTargets, HiddenTargets, TopKTargets
from abkd.teachers.cache.encoding import DenseEncoding, KeptEncoding
from abkd.teachers.cache.manifest import example_key, shard_file
from abkd.teachers.cache.shards import write_shard
from abkd.teachers.cache.store import Store
from abkd.teachers.cached import HEAD, CachedTeacher, head_digest, read_head, write_head

VOCAB, WIDTH = 31, 5
DATA = {"data.prompt_format": "chat", "data.max_tokens": 128, "data.train": "a.jsonl"}


class Example(NamedTuple):
    example_id: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


EXAMPLES = [Example(10 * n, (1, n), tuple(range(n % 4 + 1))) for n in range(7)]
HEADS = {
    "plain": LMHead(torch.randn(VOCAB, WIDTH)),
    "whole": LMHead(torch.randn(VOCAB, WIDTH), torch.randn(VOCAB), 0.5, 3.0),
    "half": LMHead(torch.randn(VOCAB, WIDTH).bfloat16()),
}
REDUCED = {"k": 6, "top_p": 1.0, "value_bits": 16, "num_draws": 0, "num_exact": 0, "temperature": 1.0}


def write(folder, kind, dtype=torch.float32, head=HEADS["plain"], k=6):
    """Writes a cache of EXAMPLES; the rows that went in, by example id."""
    width = {"hidden": WIDTH}.get(kind, VOCAB)
    targets = {"kind": kind, "width": width, "dtype": str(dtype).removeprefix("torch.")}
    rows = {each.example_id: 2 * torch.randn(len(each.completion_ids), width) for each in EXAMPLES}
    encoding = DenseEncoding(width, dtype)
    if kind == "hidden":
        targets["head"] = head_digest(head)
        write_head(head, folder / HEAD)
    if kind == "top_k":
        targets = {"kind": kind} | REDUCED | {"k": k}
        encoding = KeptEncoding(VOCAB, 16)
        rows = {name: TopKTargets.of_logits(logits, k, tail="lump") for name, logits in rows.items()}
    if kind == "sampled":
        targets = {"kind": kind} | REDUCED | {"num_draws": 4, "num_exact": 2}
        encoding = KeptEncoding(VOCAB, 16, 4, 2)
        rows = {name: TopKTargets.sample(logits, 4, num_exact=2) for name, logits in rows.items()}
    manifest = make_manifest(targets=targets, vocab=VOCAB, shards=[[4, 10], [3, 6]], data=DATA | {"digest": "3d"})
    for number, part in enumerate((EXAMPLES[:4], EXAMPLES[4:])):
        keys = [example_key(each.prompt_ids, each.completion_ids) for each in part]
        encoded = [encoding.encode(rows[each.example_id]) for each in part]
        write_shard(folder, number, manifest.digest, keys, encoded)
    return manifest, rows


def opened(folder, manifest, tail=None, examples=EXAMPLES):
    teacher = CachedTeacher(Store(folder, manifest, "teacher.path"), tail, field="teacher.path")
    teacher.expect(examples, DATA)
    return teacher


def batch_of(ids, counted=lambda place: True, examples=EXAMPLES):
    """A padded batch of examples, of whose completion tokens those at the places counted."""
    chosen = [next(each for each in examples if each.example_id == name) for name in ids]
    input_ids = torch.zeros(len(ids), max(len(each.prompt_ids + each.completion_ids) for each in chosen) + 1).long()
    attention_mask, mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)[:, 1:].bool()
    for row, each in enumerate(chosen):
        first, length = len(each.prompt_ids), len(each.prompt_ids + each.completion_ids)
        input_ids[row, :length] = torch.tensor(each.prompt_ids + each.completion_ids)
        attention_mask[row, :length] = 1
        for place in range(len(each.completion_ids)):
            mask[row, first + place - 1] = counted(place)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask, "example_ids": torch.tensor(ids)}


def targets_of(teacher, ids, examples=EXAMPLES):
    return teacher.targets(**batch_of(ids, examples=examples))


ORDER = [60, 0, 30, 30, 10]


def test_an_example_that_nobody_spoke_of_is_one_line(tmp_path):
    manifest, _ = write(tmp_path, "logits")
    batch = batch_of(ORDER)
    with pytest.raises(InputError, match=r"example 60 was not among those that expect\(\) was given"):
        CachedTeacher(Store(tmp_path, manifest, "teacher.path")).targets(**batch)


@pytest.mark.parametrize("kind, tail", [("logits", None), ("hidden", None), ("top_k", "uniform"), ("sampled", None)])
def test_a_mask_may_count_a_part_of_the_completions(tmp_path, kind, tail):
    manifest, _ = write(tmp_path, kind)
    teacher = opened(tmp_path, manifest, tail)
    lengths = [len(each.completion_ids) for name in ORDER for each in EXAMPLES if each.example_id == name]
    whole = targets_of(teacher, ORDER).logits(0, sum(lengths))
    first = [sum(lengths[:number]) for number in range(len(lengths))]
    found = teacher.targets(**batch_of(ORDER, counted=lambda place: place == 0))
    assert torch.equal(found.logits(0, len(ORDER)), whole[first])
    none = teacher.targets(**batch_of(ORDER, counted=lambda place: False))
    assert none.shape == (0, VOCAB)
    beyond = batch_of(ORDER)
    beyond["mask"][0, 0] = True
    with pytest.raises(InputError, match="counts tokens outside the completions"):
        teacher.targets(**beyond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_come_back_in_the_order_of_the_batch(tmp_path, dtype):
    manifest, rows = write(tmp_path, "logits", dtype)
    teacher = opened(tmp_path, manifest)
    found = targets_of(teacher, ORDER)
    assert isinstance(found, DenseTargets) and teacher.vocab == VOCAB
    truth = torch.cat([rows[name] for name in ORDER]).to(dtype).float()
    assert found.logits(0, len(truth)).equal(truth)
    assert teacher.logits(**batch_of([30])).equal(rows[30].to(dtype).float())
    teacher.narrow(VOCAB - 2)
    assert teacher.vocab == VOCAB - 2
    assert targets_of(teacher, ORDER).logits(0, len(truth)).equal(truth[:, : VOCAB - 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_hidden_states_come_back_with_their_head(tmp_path, name, dtype):
    head = HEADS[name]
    manifest, rows = write(tmp_path, "hidden", dtype, head)
    teacher = opened(tmp_path, manifest)
    found = targets_of(teacher, ORDER)
    hidden = torch.cat([rows[name] for name in ORDER]).to(dtype)
    assert isinstance(found, HiddenTargets) and found.hidden.equal(hidden)
    read = found.head
    assert read.weight.equal(head.weight) and read.weight.dtype == head.weight.dtype
    assert (read.logit_scale, read.softcap) == (head.logit_scale, head.softcap)
    assert found.logits(0, len(hidden)).equal(head.logits(hidden))
    teacher.narrow(VOCAB - 2)
    narrow = targets_of(teacher, ORDER)
    assert teacher.vocab == VOCAB - 2 and narrow.shape == (len(hidden), VOCAB - 2)
    torch.testing.assert_close(narrow.logits(0, len(hidden)), head.logits(hidden)[:, : VOCAB - 2])


@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalise"])
def test_top_k_targets_come_back_under_the_tail_that_is_chosen(tmp_path, tail):
    manifest, rows = write(tmp_path, "top_k")
    found = targets_of(opened(tmp_path, manifest, tail), ORDER)
    assert isinstance(found, TopKTargets) and found.tail == tail and found.shape == (14, VOCAB)
    truth = TopKTargets.cat([rows[name] for name in ORDER])
    assert found.ids.long().equal(truth.ids)
    torch.testing.assert_close(found.log_probs, truth.log_probs, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.tail_log_mass, truth.tail_log_mass, rtol=0, atol=1e-3)


def test_a_sample_comes_back(tmp_path):
    manifest, rows = write(tmp_path, "sampled")
    found = targets_of(opened(tmp_path, manifest), ORDER)
    truth = TopKTargets.cat([rows[name] for name in ORDER])
    assert found.tail == "sampled"
    torch.testing.assert_close(found.log_weights, truth.log_weights, rtol=0, atol=2e-3)


@pytest.mark.parametrize("k", [3, VOCAB - 3, VOCAB - 2, VOCAB])
@pytest.mark.parametrize("tail", ["uniform", "renormalise"])
def test_top_k_targets_of_a_narrower_vocabulary(tmp_path, k, tail):
    """As if the logits were -inf there: what is kept is renormalised, and a rest that holds no class has no mass."""
    vocab = VOCAB - 3
    manifest, rows = write(tmp_path, "top_k", k=k)
    teacher = opened(tmp_path, manifest, tail)
    teacher.narrow(vocab)
    if k == 3 and any((row.ids >= vocab).all(-1).any() for row in rows.values()):
        pytest.skip("a row keeps no class that stays")
    found = targets_of(teacher, ORDER)
    assert found.shape == (14, vocab) and teacher.vocab == vocab
    truth = TopKTargets.cat([rows[name] for name in ORDER])
    for row, (ids, log_p, rest) in enumerate(zip(truth.ids, truth.log_probs, truth.tail_log_mass, strict=True)):
        stays = ids < vocab
        nothing_else = int(stays.sum()) == vocab
        mass = log_p[stays].exp().sum() + (0 if nothing_else else rest.exp())
        here = found.log_probs[row] > -math.inf
        expected = dict(zip(ids[stays].tolist(), (log_p[stays].exp() / mass).tolist(), strict=True))
        read = dict(zip(found.ids[row][here].tolist(), found.log_probs[row][here].exp().tolist(), strict=True))
        assert read.keys() == expected.keys()
        assert all(read[key] == pytest.approx(value, rel=2e-3) for key, value in expected.items())
    if tail == "uniform":
        torch.testing.assert_close(found.logits(0, 14).exp().sum(-1), torch.ones(14))


def test_a_subset_in_another_order_under_other_ids_is_found(tmp_path):
    manifest, rows = write(tmp_path, "logits")
    examples = [EXAMPLES[n]._replace(example_id=index) for index, n in enumerate((5, 2))]
    found = targets_of(opened(tmp_path, manifest, examples=examples), [1, 0], examples)
    assert found.values.equal(torch.cat([rows[20], rows[50]]))


def refusal(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, "they are other texts than those it was made of, under the same names"),
        ({"data.prompt_format": "alpaca"}, "made with data.prompt_format='chat', and here is data.prompt_format='alp"),
        ({"data.max_tokens": 9}, "made with data.max_tokens=128, and here is data.max_tokens=9"),
        ({"data.train": "b.jsonl"}, "made with data.train='a.jsonl', and here is data.train='b.jsonl'"),
    ],
)
def test_examples_that_it_lacks_are_refused_with_the_reason(tmp_path, change, said):
    manifest, _ = write(tmp_path, "logits")
    teacher = opened(tmp_path, manifest)
    others = [*EXAMPLES, Example(99, (1, 2), (77,)), Example(98, (1,), ())]
    line = refusal(lambda: teacher.expect(others, DATA | change))
    assert "lacks 2 of 9 examples" in line and said in line and str(tmp_path) in line


def test_an_example_that_is_lacking_because_a_shard_was_altered_names_the_shard(tmp_path):
    manifest, _ = write(tmp_path, "logits")
    file = shard_file(tmp_path, 1)
    key = example_key(EXAMPLES[5].prompt_ids, EXAMPLES[5].completion_ids)
    whole = file.read_bytes()
    place = whole.index(key.to_bytes(8, "little", signed=True))
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert f"{file} was altered" in refusal(lambda: opened(tmp_path, manifest))


def test_a_tail_is_asked_for_where_it_counts(tmp_path):
    manifest, _ = write(tmp_path, "top_k")
    assert refusal(lambda: opened(tmp_path, manifest)).startswith("teacher.tail: missing, and the cache holds top-k")
    (tmp_path / "hidden").mkdir()
    manifest, _ = write(tmp_path / "hidden", "hidden")
    line = refusal(lambda: opened(tmp_path / "hidden", manifest, "uniform"))
    assert line.startswith("teacher.tail=uniform: the cache holds hidden states, 5 x float32, without a tail")


def test_a_head_that_was_cut_altered_or_exchanged_is_named(tmp_path):
    manifest, _ = write(tmp_path, "hidden", head=HEADS["whole"])
    file = tmp_path / HEAD
    whole = file.read_bytes()
    read_head(tmp_path, manifest, "cache")
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        assert str(file) in refusal(lambda: read_head(tmp_path, manifest, "cache"))
    for length in range(0, len(whole), 61):
        file.write_bytes(whole[:length])
        assert f"{file} is torn" in refusal(lambda: read_head(tmp_path, manifest, "cache"))
    for other in (HEADS["plain"], LMHead(HEADS["whole"].weight, HEADS["whole"].bias, 0.5, 3.1)):
        write_head(other, file)
        assert "was altered, or is of another cache" in refusal(lambda: opened(tmp_path, manifest))
    file.unlink()
    assert f"{file} is torn" in refusal(lambda: opened(tmp_path, manifest))
