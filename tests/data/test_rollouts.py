import copy
import random

import pytest
import torch
from conftest import make_gpt2, make_llama
from test_trainer import make_trainer, weights

from abkd import AlphaBeta, ForwardKL, Objective, ReverseKL
from abkd.data.batches import Collator
from abkd.data.instructions import Example
from abkd.data.rollouts import SAMPLED_ID, Adaptive, Mixed, OnPolicy, roll_out
from abkd.generation import Sampling, generate_ids

SAMPLING = Sampling(max_new_tokens=7)
PROMPTS = [(9, 10, 11), (12, 13, 14, 15, 16), (20,)]
END = 0


def batch_of(collator, completions=((5, 6), (7, 8, 9, 0), (5, 0))):
    examples = [Example(i, p, c, "", "", "") for i, (p, c) in enumerate(zip(PROMPTS, completions, strict=True))]
    return collator(examples)


def rolled(strategy, model, collator, step=0, progress=0.0, rank=0):
    def seed(purpose):
        return f"0/{step}/{purpose}/{rank if purpose == 'sampling' else 'all'}"

    batch = batch_of(collator)
    return batch, *roll_out(strategy, [batch], model, collator, end_id=END, progress=progress, seed=seed)


def rows_of(batch):
    return [
        (ids[mask.bool()].tolist(), label[mask.bool()].tolist())
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


@pytest.fixture(scope="module")
def collator(tokenizer):
    return Collator.of(tokenizer)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_every_sampled_token_is_counted_and_no_prompt_token_is(tokenizer, collator, make):
    _, batch = rolled(OnPolicy(SAMPLING), make(len(tokenizer)), collator)
    for prompt, (ids, labels) in zip(PROMPTS, rows_of(batch), strict=True):
        assert tuple(ids[: len(prompt)]) == prompt
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]
        assert 1 <= len(ids) - len(prompt) <= 7
        assert END not in ids[len(prompt) : -1]
    assert (batch["example_ids"] == SAMPLED_ID).all()


def test_the_end_token_is_kept_and_counted_even_where_it_pads(tokenizer):
    model = make_llama(len(tokenizer), tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # all tokens alike: seed and step decide
    collator = Collator(pad_id=END)
    _, batch = rolled(OnPolicy(Sampling(200)), model, collator)
    ended = [labels for ids, labels in rows_of(batch) if ids[-1] == END]
    assert ended and all(labels[-1] == END for labels in ended)


def test_the_same_text_has_the_same_loss_wherever_it_comes_from(tokenizer, collator):
    model = make_llama(len(tokenizer))
    _, sampled = rolled(OnPolicy(SAMPLING), model, collator)
    completions = [ids[len(prompt) :] for prompt, (ids, _) in zip(PROMPTS, rows_of(sampled), strict=True)]
    fixed = batch_of(collator, tuple(map(tuple, completions)))
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(sampled[name], fixed[name])


def test_samples_follow_seed_step_and_rank_alone(tokenizer, collator):
    model = make_llama(len(tokenizer))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = rolled(OnPolicy(SAMPLING), model, collator)[1]["input_ids"].tolist()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert rolled(OnPolicy(SAMPLING), model, collator)[1]["input_ids"].tolist() == first
    assert rolled(OnPolicy(SAMPLING), model, collator, step=1)[1]["input_ids"].tolist() != first
    assert rolled(OnPolicy(SAMPLING), model, collator, rank=1)[1]["input_ids"].tolist() != first


def test_mixed_samples_with_its_probability_alike_on_every_rank(tokenizer, collator):
    model = make_llama(len(tokenizer), layers=1)
    chosen = []
    for step in range(40):
        pair = [rolled(Mixed(Sampling(1), share=0.25), model, collator, step=step, rank=rank) for rank in (0, 1)]
        kinds = {made is not batch and bool((made["example_ids"] == SAMPLED_ID).all()) for batch, made in pair}
        assert len(kinds) == 1
        chosen.append(kinds.pop())
    assert 3 <= sum(chosen) <= 17  # 10 expected, standard deviation 2.7


def test_adaptive_goes_from_data_to_fresh_to_buffer():
    strategy = Adaptive(SAMPLING, threshold=0.6, capacity=2)
    grid = [(index + 0.5) / 1000 for index in range(1000)]

    def shares(progress):
        chosen = [strategy.choose(dice, progress) for dice in grid]
        return [chosen.count(kind) / 1000 for kind in ("data", "fresh", "buffer")]

    assert shares(0.25) == [0.4, 0.6, 0.0]  # the buffer is not full
    strategy.keep([Example(SAMPLED_ID, (1,), (index,), "", "", "") for index in range(3)])
    assert [example.completion_ids for example in strategy.buffer] == [(1,), (2,)]
    assert shares(0.0) == [0.4, 0.6, 0.0]
    assert shares(0.25) == pytest.approx([0.4, 0.45, 0.15])
    assert shares(1.0) == [0.4, 0.0, 0.6]
    assert {e.completion_ids for e in strategy.recall(30, random.Random(0))} == {(1,), (2,)}


def test_the_threshold_rises_where_the_validation_loss_does():
    strategy = Adaptive(SAMPLING, threshold=0.75, increase=0.1, tolerance=0.25)
    seen = []
    for loss in (2.0, 2.125, 2.25, 2.375, 2.0, 2.5, 9.0, 99.0):
        strategy.validated(loss)
        seen.append((round(strategy.threshold, 2), strategy.reference))
    assert seen == [
        (0.75, 2.0), (0.75, 2.0), (0.85, 2.25), (0.85, 2.25), (0.85, 2.25), (0.95, 2.5), (1.0, 9.0), (1.0, 99.0),
    ]  # fmt: skip


def test_adaptive_state_survives_a_checkpoint():
    strategy = Adaptive(SAMPLING, threshold=0.3, capacity=5)
    strategy.keep([Example(SAMPLED_ID, (1, 2), (3,), "", "", "")])
    strategy.validated(1.0)
    other = Adaptive(SAMPLING, capacity=5)
    other.restore(strategy.state())
    assert other == strategy and other.buffer == strategy.buffer and other.buffer.maxlen == 5


@pytest.mark.parametrize("top_p, tokens", [(0.5, {40}), (0.85, {40, 41}), (1.0, {40, 41, 42})])
def test_top_p_leaves_the_most_probable_tokens_that_hold_the_mass(tokenizer, top_p, tokens):
    model = make_llama(len(tokenizer), layers=1, tied=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings.zero_()
        embeddings[:, 0] = 1.0  # the norm makes it the root of 32
        head.zero_()
        head[:, 0] = -60.0
        for token, probability in {40: 0.6, 41: 0.3, 42: 0.1}.items():
            head[token, 0] = torch.tensor(probability).log() / 32**0.5
    drawn = generate_ids(model, [[7]] * 300, Sampling(1, top_p=top_p), end_id=END, batch_size=300)
    assert {ids[0] for ids in drawn} == tokens


def make(tokenizer, folder, rollouts, **options):
    options = {"objective": Objective(AlphaBeta()), "learning_rate": 0.05, "max_steps": 4} | options
    return make_trainer(tokenizer, folder, rollouts=rollouts, **options)


def test_a_share_of_nothing_is_the_fixed_data(tokenizer, tmp_path):
    plain, mixed = (make(tokenizer, tmp_path, rollouts) for rollouts in (None, Adaptive(SAMPLING, threshold=0.0)))
    plain.train(), mixed.train()
    assert torch.equal(weights(plain), weights(mixed))


def test_cross_entropy_counts_the_datas_completions_alone(tokenizer, tmp_path):
    found = []
    for ce_weight in (0.0, 5.0):
        trainer = make(
            tokenizer, tmp_path, OnPolicy(SAMPLING), objective=Objective(ForwardKL(), ce_weight=ce_weight), max_steps=2
        )
        trainer.train()
        found.append(weights(trainer))
        assert trainer.state.log_history[0]["ce"] == 0 and trainer.state.log_history[0]["kd"] > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_is_a_mean_over_the_sampled_tokens(tokenizer, tmp_path, accumulation):
    trainer = make(
        tokenizer,
        tmp_path,
        OnPolicy(SAMPLING),
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["num_sampled"] == 8 and log["num_tokens"] == pytest.approx(8 * log["sampled_tokens"])
    assert log["loss"] == pytest.approx(log["kd"], rel=1e-5)
    assert 0 <= log["sampled_ended"] <= 1


@pytest.mark.parametrize("make_rollouts", [lambda: OnPolicy(SAMPLING), lambda: Adaptive(SAMPLING, 0.7, capacity=6)])
def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer, tmp_path, make_rollouts):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5}
    whole = make(tokenizer, tmp_path, make_rollouts(), **options)
    whole.train()
    resumed = make(tokenizer, tmp_path, make_rollouts(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.rollouts.state() == resumed.rollouts.state()


def test_a_student_comes_closer_on_its_own_samples(tokenizer, tmp_path):
    trainer = make(
        tokenizer,
        tmp_path,
        OnPolicy(Sampling(16)),
        objective=Objective(ReverseKL()),
        max_steps=40,
        learning_rate=0.01,
        optim="adamw_torch",
    )
    before = copy.deepcopy(trainer.evaluate())
    trainer.train()
    assert trainer.evaluate()["validation_reverse_kl"] < 0.7 * before["validation_reverse_kl"]
