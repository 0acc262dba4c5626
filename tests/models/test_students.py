"""Students made of their teacher's layers."""

import copy
import itertools

import pytest
import torch
from conftest import make_gpt2, make_llama
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from abkd.errors import InputError
from abkd.models.students import kept_layers, shrink

VOCAB = 300
TEACHERS = {
    "Llama, tied": (lambda layers=4: make_llama(VOCAB, layers), "model.layers"),
    "Llama, untied": (lambda layers=4: make_llama(VOCAB, layers, tied=False), "model.layers"),
    "GPT-2": (lambda layers=4: make_gpt2(VOCAB, layers), "transformer.h"),
}
each_teacher = pytest.mark.parametrize("name", TEACHERS)


def logits(model, seed=1):
    input_ids = torch.randint(5, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("num_layers", "keep", "kept"),
    [
        (4, 1, [0]),
        (4, 2, [0, 3]),
        (5, 3, [0, 2, 4]),
        (4, 4, [0, 1, 2, 3]),
        (30, 6, [0, 6, 12, 17, 23, 29]),
        (1, 1, [0]),
    ],
)
def test_which_layers_are_kept(num_layers, keep, kept):
    assert kept_layers(num_layers, keep) == kept


@given(st.data())
def test_kept_layers_are_distinct_evenly_spaced_and_reach_both_ends(data):
    num_layers = data.draw(st.integers(2, 200))
    keep = data.draw(st.integers(2, num_layers))
    kept = kept_layers(num_layers, keep)
    steps = {later - earlier for earlier, later in itertools.pairwise(kept)}
    assert len(kept) == keep and kept[0] == 0 and kept[-1] == num_layers - 1
    assert min(steps) >= 1 and max(steps) - min(steps) <= 1


@each_teacher
def test_weights_are_the_teachers_layer_by_layer(name):
    make, path = TEACHERS[name]
    teacher = make(5)
    theirs, ours = teacher.state_dict(), shrink(teacher, 3).state_dict()
    source_of = {f"{path}.{target}.": f"{path}.{source}." for target, source in enumerate([0, 2, 4])}
    layers = 0
    for key, tensor in ours.items():
        target = next((prefix for prefix in source_of if key.startswith(prefix)), None)
        layers += target is not None
        source = source_of[target] + key.removeprefix(target) if target else key
        assert torch.equal(tensor, theirs[source]), key
    assert layers == 3 * sum(key.startswith(f"{path}.0.") for key in theirs)
    assert len(ours) - layers == sum(not key.startswith(f"{path}.") for key in theirs)


@each_teacher
def test_logits_are_those_of_the_teacher_with_the_other_layers_taken_out(name):
    make, path = TEACHERS[name]
    teacher = make()
    student = shrink(teacher, 2)
    cut = copy.deepcopy(teacher)
    body, attribute = path.split(".")
    layers = getattr(getattr(cut, body), attribute)
    setattr(getattr(cut, body), attribute, nn.ModuleList([layers[0], layers[3]]))
    cut.config.num_hidden_layers = 2
    assert torch.equal(logits(student), logits(cut))
    assert not torch.allclose(logits(student), logits(teacher), atol=0.1)


@each_teacher
def test_all_layers_give_the_teacher_itself(name):
    teacher = TEACHERS[name][0]()
    student = shrink(teacher, 4)
    assert type(student) is type(teacher) and not student.training
    assert torch.equal(logits(student), logits(teacher))


@each_teacher
def test_nothing_is_shared_with_the_teacher(name):
    teacher = TEACHERS[name][0]()
    before, config = logits(teacher), teacher.config.to_dict()
    student = shrink(teacher, 3)
    storages = [
        {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        for model in (student, teacher)
    ]
    assert not storages[0] & storages[1]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.generation_config.max_length = 3
    assert torch.equal(logits(teacher), before)
    assert teacher.config.to_dict() == config and teacher.generation_config.max_length != 3


@each_teacher
def test_a_tied_head_stays_tied_and_an_untied_one_apart(name):
    student = shrink(TEACHERS[name][0](), 2)
    head, embeddings = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    assert (head is embeddings) == (name != "Llama, untied")


@each_teacher
def test_a_student_generates_and_survives_saving(name, tmp_path):
    student = shrink(TEACHERS[name][0](), 2)
    prompt = torch.tensor([[7, 8, 9]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    generated = student.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    ids = prompt
    for _ in range(5):
        ids = torch.cat([ids, student(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(logits(loaded), logits(student))
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (name != "Llama, untied")


def test_a_student_of_a_bf16_teacher_keeps_its_rotary_frequencies(tmp_path):
    """They stay fp32 in a loaded model; rounding them to bf16 would turn the positions."""
    make_llama(VOCAB).save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    student = shrink(teacher, 4)
    assert student.dtype == torch.bfloat16
    assert torch.equal(student.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)
    assert torch.equal(logits(student), logits(teacher))


TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip


def test_what_the_configuration_says_of_each_layer_moves_with_the_layers(tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    config = Qwen3Config(**TINY, head_dim=8, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    student = shrink(Qwen3ForCausalLM(config), 2)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student))


def test_layers_without_positions_stay_without():
    teacher = SmolLM3ForCausalLM(SmolLM3Config(**TINY, no_rope_layers=[1, 1, 1, 0])).eval()
    student = shrink(teacher, 2)
    assert student.config.no_rope_layers == [1, 0]
    assert [layer.self_attn.use_rope for layer in student.model.layers] == [1, 0]


@pytest.mark.parametrize("keep_layers", [-1, 0, 5])
def test_a_number_of_layers_that_is_not_there_is_refused(keep_layers):
    with pytest.raises(InputError) as caught:
        shrink(make_llama(VOCAB), keep_layers)
    assert str(caught.value) == f"student.keep_layers={keep_layers}: the teacher has 4 layers; use 1 to 4"


def test_layers_can_be_named():
    teacher = make_llama(VOCAB)
    student = shrink(teacher, [0, 1, 3])
    assert student.config.num_hidden_layers == 3
    for ours, theirs in enumerate([0, 1, 3]):
        source = teacher.model.layers[theirs].state_dict()
        assert all(torch.equal(x, source[name]) for name, x in student.model.layers[ours].state_dict().items())


@pytest.mark.parametrize("layers", [[], [0, 4], [-1, 2], [2, 1], [1, 1]])
def test_layers_that_are_not_there_or_do_not_rise_are_refused(layers):
    with pytest.raises(InputError) as caught:
        shrink(make_llama(VOCAB), layers)
    assert str(caught.value) == (f"student.layers={layers}: must rise, between 0 and 3, as the teacher has 4 layers")


def test_a_model_of_two_stacks_is_refused():
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(InputError) as caught:
        shrink(T5ForConditionalGeneration(config), 1)
    assert str(caught.value) == (
        "student.kind=shrink: T5ForConditionalGeneration has 2 stacks of decoder layers, needs exactly one; "
        "give the student as a checkpoint (student.kind=pretrained)"
    )
