"""Heads read off the models of the field, tied or not, and what they cannot represent."""

import pytest
import torch
import transformers
from conftest import make_llama

from abkd import InputError
from abkd.head import HeadInputs, LMHead, completion_hidden, completion_logits
from abkd.targets import DenseTargets, HiddenTargets

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Mistral": SIZES,
    "GPT2": GPT2_SIZES,
    "GPTJ": GPT2_SIZES | {"rotary_dim": 4},
    "GPTNeoX": SIZES,
    "Phi": SIZES,
    "Gemma2": SIZES | {"final_logit_softcapping": 3.0, "head_dim": 8},
    "Cohere": SIZES | {"logit_scale": 0.25},
    "Granite": SIZES | {"logits_scaling": 4.0},
    "OPT": SIZES,
}


def make(family, tied):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], tie_word_embeddings=tied)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch():
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 3:6] = mask[1, 2:4] = True
    ids = torch.randint(3, 300, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mask": mask}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_models_logits(family, tied):
    model, inputs = make(family, tied), batch()
    head = LMHead.of(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == (family in ("GPTJ", "Phi"))
    hidden = completion_hidden(model, **inputs)
    logits = completion_logits(model, **inputs)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(logits.sum(), model.get_input_embeddings().weight, retain_graph=True)
    (found,) = torch.autograd.grad(head.logits(hidden).sum(), model.get_input_embeddings().weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_gemma3_text_and_its_soft_cap():
    sizes = SIZES | {"final_logit_softcapping": 2.0, "head_dim": 8}
    head = LMHead.of(transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes)))
    assert (head.softcap, head.logit_scale, head.bias) == (2.0, None, None)


def test_scales_are_read_from_the_config():
    assert LMHead.of(make("Cohere", True)).logit_scale == 0.25
    assert LMHead.of(make("Granite", True)).logit_scale == 0.25


def test_a_model_that_does_more_to_its_logits_is_refused_by_name():
    model = make_llama(300)
    forward = model.forward

    def odd(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True)
        return output

    model.forward = odd
    with pytest.raises(InputError, match="LlamaForCausalLM does more to its logits than a linear layer"):
        LMHead.of(model)


def test_a_head_that_is_no_linear_layer_is_refused_by_name():
    model = make_llama(300)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(
        InputError, match=r"the output head of LlamaForCausalLM is a torch\.nn\..*Sequential, not a linear layer"
    ):
        LMHead.of(model)


def test_reading_leaves_the_model_as_it_was():
    model = make_llama(300).train()
    LMHead.of(model)
    assert model.training
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks


def test_no_logits_are_made_while_the_inputs_of_the_head_are_taken():
    model, inputs = make("Llama", True), batch()
    with HeadInputs(model) as taken:
        logits = model(input_ids=inputs["input_ids"]).logits
    assert logits.shape == (2, 0, 300) and taken.taken.shape == (2, 9, 32)
    assert model(input_ids=inputs["input_ids"]).logits.shape == (2, 9, 300)


def test_the_backward_through_hidden_states_costs_the_head_nothing():
    model = make("Llama", False)
    completion_hidden(model, **batch()).sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.norm() > 0


def test_without_a_counted_token_hidden_states_are_attached():
    model, inputs = make("Llama", False), batch()
    inputs["mask"][:] = False
    hidden = completion_hidden(model, **inputs)
    assert hidden.shape == (0, 32) and hidden.requires_grad
    assert completion_logits(model, **inputs).shape == (0, 300)


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: LMHead(torch.zeros(3)), r"weight must be \[vocab, hidden\], got \(3,\)"),
        (lambda: LMHead(torch.zeros(3, 2), torch.zeros(2)), r"bias must be \[vocab\] = \(3,\), got \(2,\)"),
        (lambda: LMHead(torch.zeros(3, 2), softcap=0.0), "softcap must be above 0, got 0.0; None leaves it out"),
        (lambda: DenseTargets(torch.zeros(3)), r"logits of the teacher must be \[N, vocab\], got \(3,\)"),
        (
            lambda: HiddenTargets(torch.zeros(3, 4), LMHead(torch.zeros(5, 2))),
            r"hidden states of the teacher must be \[N, 2\] for its head, got \(3, 4\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(made, message):
    with pytest.raises(InputError, match=message):
        made()
