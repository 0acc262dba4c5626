import pytest
import torch
from conftest import make_gpt2, make_llama

from abkd import InProcessTeacher, InputError
from abkd.head import completion_logits
from abkd.targets import DenseTargets

VOCAB = 40


def batch():
    input_ids = torch.randint(2, VOCAB, (3, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3:7], mask[1, 2:5], mask[2, 7] = True, True, True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask}


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_completion_logits_are_the_models_logits_at_the_mask(make):
    model, inputs = make(VOCAB), batch()
    whole = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(completion_logits(model, **inputs), whole[:, :-1][inputs["mask"]])


def test_no_counted_token_gives_no_row_and_a_zero_gradient():
    model, inputs = make_llama(VOCAB), batch()
    inputs["mask"][:] = False
    logits = completion_logits(model, **inputs)
    assert logits.shape == (0, VOCAB)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_teacher_gives_its_models_logits_without_a_graph(make, remember):
    model, inputs = make(VOCAB).train(), batch()
    teacher = InProcessTeacher(model, remember=remember)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    truth = completion_logits(model, **inputs)
    for _ in range(2):
        logits = teacher.logits(**inputs, example_ids=torch.tensor([4, 8, 2]))
        torch.testing.assert_close(logits, truth)
        assert not logits.requires_grad


def test_what_is_remembered_is_not_computed_again():
    inputs = batch()
    teacher = InProcessTeacher(make_llama(VOCAB), remember=True)
    first = teacher.logits(**inputs, example_ids=torch.tensor([4, 8, 2]))
    calls = []
    teacher.model.model.register_forward_hook(lambda *_: calls.append(1))
    order = torch.tensor([2, 0, 1])
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    again = teacher.logits(**shuffled, example_ids=torch.tensor([2, 4, 8]))
    assert not calls
    lengths = inputs["mask"].sum(1).tolist()
    torch.testing.assert_close(again, torch.cat([first.split(lengths)[i] for i in order]))
    teacher.logits(**shuffled, example_ids=torch.tensor([2, 4, 9]))
    assert calls


def test_a_soft_cap_is_remembered_too():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    model, inputs = Gemma2ForCausalLM(config), batch()
    truth = completion_logits(model.eval(), **inputs).detach()
    for remember in (False, True):
        teacher = InProcessTeacher(model, remember=remember)
        torch.testing.assert_close(teacher.logits(**inputs, example_ids=torch.arange(3)), truth)
        targets = teacher.targets(**inputs, example_ids=torch.arange(3))
        torch.testing.assert_close(targets.logits(0, len(truth)), truth)


def test_a_head_that_cannot_be_read_gives_logits_and_cannot_be_remembered():
    model, inputs = make_llama(VOCAB), batch()
    forward = model.forward

    def odd(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = output.logits.abs()
        return output

    model.forward = odd
    truth = completion_logits(model, **inputs)
    targets = InProcessTeacher(model).targets(**inputs, example_ids=torch.arange(3))
    assert isinstance(targets, DenseTargets)
    torch.testing.assert_close(targets.values, truth.detach())
    with pytest.raises(InputError, match=r"teacher: LlamaForCausalLM does more .*teacher\.remember=false"):
        InProcessTeacher(model, remember=True).logits(**inputs, example_ids=torch.arange(3))
