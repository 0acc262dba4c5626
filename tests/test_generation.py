import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer

from abkd.generation import Completion, generate

PROMPTS = ["The cat", "Why does the quick brown fox like rain?", "x", "The dog likes milk and", "hen"]
MODELS = {"Llama": make_llama, "GPT-2": make_gpt2}


def greedy(model, tokenizer, prompt, max_new_tokens):
    """One prompt, no padding, no cache: the most probable token, again and again."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    new = []
    while len(new) < max_new_tokens and tokenizer.eos_token_id not in new:
        new.append(
            model(input_ids=torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1].argmax().item()
        )
    return Completion(tokenizer.decode(new, skip_special_tokens=True), tokenizer.eos_token_id in new)


def successor_model(tokenizer, scores: dict[str, dict[str, float]]):
    """Reads the last token alone; `scores[a][b]` is the logit of b after a, 0 for tokens that are not named."""
    model = make_llama(len(tokenizer), layers=1, tied=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        embeddings = model.get_input_embeddings().weight
        model.get_output_embeddings().weight.zero_()
        embeddings.zero_()
        for axis, (token, followers) in enumerate(scores.items()):
            embeddings[tokenizer.convert_tokens_to_ids(token), axis] = 1.0  # normed to the root of 32
            for follower, score in followers.items():
                model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(follower), axis] = score / 32**0.5
    return model


CHAIN = {"A": {"B": 9.0}, "B": {"C": 9.0}, "C": {"D": 9.0}, "D": {"<|end|>": 9.0}}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_is_the_argmax_loop_for_prompts_of_different_lengths(tokenizer, name, batch_size):
    model = MODELS[name](len(tokenizer))
    expected = [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size) == expected
    assert len(set(expected)) == len(PROMPTS)


@pytest.mark.parametrize("pad_token", ["<|pad|>", "<|end|>", None])
def test_a_completion_ends_at_the_end_token_or_at_the_limit(pad_token):
    tokenizer = make_tokenizer()
    model = successor_model(tokenizer, CHAIN)
    tokenizer.pad_token = pad_token
    completions = generate(model, tokenizer, ["C", "A", "D", "B"], max_new_tokens=3)
    assert completions == [
        Completion("D", True),
        Completion("BCD", False),
        Completion("", True),
        Completion("CD", True),
    ]


def test_special_tokens_of_the_prompt_are_read_and_not_answered(tokenizer):
    model = successor_model(tokenizer, CHAIN)
    assert generate(model, tokenizer, ["<|user|>B<|end|>A"], max_new_tokens=9) == [Completion("BCD", True)]


def test_no_prompts_give_no_completions(tokenizer):
    assert generate(make_llama(len(tokenizer)), tokenizer, [], max_new_tokens=3) == []


def test_progress_adds_up_to_the_prompts(tokenizer):
    done = []
    model = successor_model(tokenizer, CHAIN)
    generate(model, tokenizer, ["A"] * 5, max_new_tokens=1, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]


def test_sampling_follows_the_seed_and_nothing_else(tokenizer):
    model = make_llama(len(tokenizer))
    options = {"max_new_tokens": 6, "temperature": 1.0}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, **options, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate(model, tokenizer, PROMPTS, **options, seed=3) == first
    assert generate(model, tokenizer, PROMPTS, **options, seed=4) != first


def test_sampling_draws_from_the_softmax_of_the_logits_by_the_temperature(tokenizer):
    scores = {"B": 4.0, "C": 2.0, "D": 0.0}
    others = dict.fromkeys(tokenizer.get_vocab(), -60.0)
    model = successor_model(tokenizer, {"A": others | scores})
    drawn = [
        c.text for c in generate(model, tokenizer, ["A"] * 6000, max_new_tokens=1, temperature=2.0, batch_size=3000)
    ]
    expected = torch.tensor(list(scores.values())).div(2.0).softmax(-1)
    shares = torch.tensor([drawn.count(token) / 6000 for token in scores])
    assert torch.allclose(shares, expected, atol=0.03)  # five standard deviations of a share


def test_sampling_draws_from_the_whole_vocabulary(tokenizer):
    almost_equal = {token: 1e-4 * index for token, index in tokenizer.get_vocab().items()}
    model = successor_model(tokenizer, {"A": almost_equal})
    drawn = generate(model, tokenizer, ["A"] * 3000, max_new_tokens=1, temperature=1.0, batch_size=3000)
    assert len({completion.text for completion in drawn}) > 90  # of 300 tokens; many are not text by themselves


def test_the_checkpoints_own_decoding_options_play_no_part(tokenizer):
    model = make_llama(len(tokenizer))
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    sampled = generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0)
    own = {
        "repetition_penalty": 5.0,
        "top_k": 2,
        "top_p": 0.3,
        "min_p": 0.2,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
    }
    model.generation_config.update(**own)
    model.generation_config.max_length = 3
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == plain
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0) == sampled
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_as_before_and_dropout_is_off(tokenizer, training):
    model = make_gpt2(len(tokenizer))
    assert model.config.resid_pdrop > 0
    expected = [greedy(model.eval(), tokenizer, prompt, 6) for prompt in PROMPTS]
    assert generate(model.train(training), tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert model.training == training


def test_the_model_is_as_before_where_generation_fails(tokenizer):
    model = make_llama(len(tokenizer)).train()
    own = model.generation_config

    def fail(num_done):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=1, progress=fail)
    assert model.training and model.generation_config is own
