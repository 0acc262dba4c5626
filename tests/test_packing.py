"""Packed examples: nothing lost, nothing seen of each other, the same rows and gradients as padded."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_head import FAMILIES, SIZES, make

from abkd import InputError
from abkd.head import check_packing, completion_hidden, completion_logits
from abkd.packing import pack


def batch(lengths, seed=0):
    """A right-padded batch whose completions are the last half of each example."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    input_ids = torch.randint(3, 300, attention_mask.shape, generator=generator) * attention_mask
    mask = attention_mask[:, 1:].bool() & (torch.arange(1, max(lengths)) >= torch.tensor(lengths).unsqueeze(1) // 2)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask}


def test_the_longest_goes_first_and_each_into_the_first_row_with_room():
    laid = pack(*(batch([2, 5, 3, 1, 4])[name] for name in ("input_ids", "attention_mask")))
    assert laid.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert laid.places[:, 0].tolist() == [13, 0, 10, 9, 5]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_every_token_stands_in_one_place_at_its_own_position(lengths):
    padded = batch(lengths)
    is_token = padded["attention_mask"].bool()
    laid = pack(padded["input_ids"], padded["attention_mask"])
    places = laid.places[is_token]
    assert len(places.unique()) == sum(lengths)
    assert laid.input_ids.shape[0] <= len(lengths) and laid.input_ids.shape[1] == max(lengths)
    assert torch.equal(laid.input_ids.flatten()[places], padded["input_ids"][is_token])
    columns = torch.arange(is_token.shape[1]).expand_as(is_token)
    assert torch.equal(laid.position_ids.flatten()[places], columns[is_token])
    assert (laid.position_ids[:, 0] == 0).all()
    steps = laid.position_ids.diff(dim=1)
    assert ((steps == 1) | (laid.position_ids[:, 1:] == 0)).all()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "OPT"])
def test_packed_rows_and_gradients_are_those_of_the_padded_batch(family):
    model, inputs = make(family, tied=False), batch([9, 4, 2, 5, 3])
    check_packing(model)
    weight = model.get_input_embeddings().weight
    for rows_of in (completion_logits, completion_hidden):
        padded, packed = rows_of(model, **inputs), rows_of(model, **inputs, packed=True)
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
        along = torch.randn(padded.shape, generator=torch.Generator().manual_seed(1))
        gradients = [torch.autograd.grad((rows * along).sum(), weight)[0] for rows in (padded, packed)]
        assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_no_example_sees_another():
    model, inputs = make("Llama", tied=False), batch([8, 3, 5])
    before = completion_hidden(model, **inputs, packed=True)
    inputs["input_ids"][2] += inputs["attention_mask"][2]
    after = completion_hidden(model, **inputs, packed=True)
    first_two = int(inputs["mask"][:2].sum())
    assert torch.equal(before[:first_two], after[:first_two])
    assert not torch.allclose(before[first_two:], after[first_two:])


def test_without_a_counted_token_packed_rows_are_attached():
    model, inputs = make("Llama", tied=False), batch([4, 2])
    inputs["mask"][:] = False
    hidden = completion_hidden(model, **inputs, packed=True)
    assert hidden.shape == (0, 32) and hidden.requires_grad


def test_a_model_in_which_packed_examples_see_each_other_is_refused():
    model = make("OPT", tied=False).train()  # its mask does not follow from its position ids
    with pytest.raises(InputError, match=r"training\.pack: in OPTForCausalLM packed examples would see each other"):
        check_packing(model)
    assert model.training


def test_a_recurrent_model_is_refused():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=300, hidden_size=SIZES["hidden_size"], num_hidden_layers=2)
    with pytest.raises(InputError, match=r"training\.pack: (in )?MambaForCausalLM"):
        check_packing(transformers.MambaForCausalLM(config))


def test_a_model_without_position_ids_is_refused():
    model = make("Llama", tied=False)
    forward = model.forward

    def plain(input_ids, attention_mask=None, use_cache=None):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = plain
    with pytest.raises(InputError, match=r"LlamaForCausalLM takes no position ids .*; set training\.pack=false"):
        check_packing(model)
