"""Do student and teacher read the same tokens? A divergence between their rows means nothing otherwise."""

from abkd.errors import InputError


def check_same_vocabulary(*, student, teacher) -> None:
    """Refuses two tokenizers that give any token a different id.

    Args:
        student, teacher: Hugging Face tokenizers.

    Raises:
        InputError: naming the first tokens that differ.
    """
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    if student_ids == teacher_ids:
        return
    student_tokens = {index: token for token, index in student_ids.items()}
    teacher_tokens = {index: token for token, index in teacher_ids.items()}
    indices = sorted(student_tokens.keys() | teacher_tokens.keys())
    differing = [index for index in indices if student_tokens.get(index) != teacher_tokens.get(index)]
    shown = "; ".join(
        f"id {index} is {student_tokens.get(index)!r} to the student, {teacher_tokens.get(index)!r} to the teacher"
        for index in differing[:3]
    )
    raise InputError(
        f"student and teacher have different tokenizers: {len(differing):,} of {len(indices):,} ids differ ({shown}); "
        "choose a student of the teacher's family, or student.kind=shrink"
    )


def check_same_width(*, student, teacher) -> None:
    """Refuses two models whose rows of logits have different lengths (padded vocabularies included).

    Args:
        student, teacher: Hugging Face models.
    """
    widths = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if widths[0] != widths[1]:
        raise InputError(
            f"the student has {widths[0]:,} logits a token and the teacher {widths[1]:,}; "
            "resize one with resize_token_embeddings so that both are equal"
        )
