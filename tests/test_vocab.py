import re

import pytest
import torch
from conftest import make_llama, make_tokenizer

from abkd.errors import InputError
from abkd.teachers.in_process import InProcessTeacher
from abkd.vocab import align_widths, check_same_vocabulary


def test_equal_tokenizers_pass(tokenizer):
    check_same_vocabulary(student=make_tokenizer(), teacher=tokenizer)


def test_different_tokenizers_are_refused_with_the_first_differences(tokenizer):
    other = make_tokenizer(corpus=["zzz yyy xxx www zzz yyy"])
    with pytest.raises(InputError) as caught:
        check_same_vocabulary(student=other, teacher=tokenizer)
    student, teacher = ({index: token for token, index in t.get_vocab().items()} for t in (other, tokenizer))
    differing = [index for index in range(max(len(student), len(teacher))) if student.get(index) != teacher.get(index)]
    first = differing[0]
    message = str(caught.value)
    assert f"{len(differing)} of {max(len(student), len(teacher))} ids differ" in message
    assert f"(id {first} is {student[first]!r} to the student, {teacher[first]!r} to the teacher; id " in message
    assert message.endswith("choose a student of the teacher's family, or student.kind=shrink")
    assert "\n" not in message


def test_one_more_token_is_a_difference(tokenizer):
    longer = make_tokenizer()
    longer.add_tokens(["<extra>"])
    expected = f"1 of {len(tokenizer) + 1} ids differ (id {len(tokenizer)} is None to the student, '<extra>'"
    with pytest.raises(InputError, match=re.escape(expected)):
        check_same_vocabulary(student=tokenizer, teacher=longer)


def test_as_many_tokens_are_not_the_same_tokens():
    student, teacher = make_tokenizer(), make_tokenizer()
    student.add_tokens(["<ours>"])
    teacher.add_tokens(["<theirs>"])
    expected = f"id {len(teacher) - 1} is '<ours>' to the student, '<theirs>' to the teacher"
    with pytest.raises(InputError, match=re.escape(expected)):
        check_same_vocabulary(student=student, teacher=teacher)


def align(*, student, teacher, tokenizer):
    return align_widths(student=student, teacher=InProcessTeacher(teacher), tokenizer=tokenizer)


IDS = torch.tensor([[5, 6, 7, 8]])


def test_equal_widths_are_left_alone(tokenizer):
    student, teacher = make_llama(1280, layers=1), make_llama(1280, layers=2)
    before = student(IDS).logits
    assert align(student=student, teacher=teacher, tokenizer=tokenizer) == ""
    assert torch.equal(student(IDS).logits, before) and before.shape[-1] == 1280


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_padding_is_left_out_of_the_wider_one(tokenizer, wide, tied):
    widths = {"student": len(tokenizer), "teacher": len(tokenizer)} | {wide: 1280}
    models = {name: make_llama(width, layers=1, tied=tied) for name, width in widths.items()}
    other = "teacher" if wide == "student" else "student"
    before = {name: model(IDS).logits for name, model in models.items()}
    assert align(**models, tokenizer=tokenizer) == (
        f"the {wide} has 1,280 logits a token and the {other} {len(tokenizer)}: the last {1280 - len(tokenizer)} stand "
        "for no token and are left out"
    )
    after = {name: model(IDS).logits for name, model in models.items()}
    assert torch.equal(after[other], before[other])
    masked = before[wide].clone()
    masked[..., len(tokenizer) :] = -torch.inf
    expected = masked.log_softmax(-1)[..., : len(tokenizer)]
    torch.testing.assert_close(after[wide].log_softmax(-1), expected)
    assert models[wide].config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("narrow", ["student", "teacher"])
def test_a_model_without_a_logit_for_some_token_is_refused(tokenizer, narrow):
    models = {name: make_llama(280 if name == narrow else len(tokenizer), layers=1) for name in ("student", "teacher")}
    with pytest.raises(InputError) as caught:
        align(**models, tokenizer=tokenizer)
    assert str(caught.value) == (
        f"the {narrow} has 280 logits a token, and the tokenizer's ids go up to {len(tokenizer) - 1}; "
        f"choose a {narrow} made for this tokenizer"
    )
