import re

import pytest
from conftest import make_llama, make_tokenizer

from abkd.errors import InputError
from abkd.vocab import check_same_vocabulary, check_same_width


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


def test_rows_of_logits_must_have_one_width():
    check_same_width(student=make_llama(300, layers=1), teacher=make_llama(300, layers=2))
    with pytest.raises(InputError) as caught:
        check_same_width(student=make_llama(300, layers=1), teacher=make_llama(1280, layers=1))
    assert str(caught.value) == (
        "the student has 300 logits a token and the teacher 1,280; "
        "resize one with resize_token_embeddings so that both are equal"
    )
