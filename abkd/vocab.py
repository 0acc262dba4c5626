"""Do student and teacher read the same tokens? A divergence between their rows means nothing otherwise."""

from abkd.errors import InputError


def check_same_vocabulary(*, student, teacher, names: tuple[str, str] = ("student", "teacher")) -> None:
    """Refuses two tokenizers that give any token a different id.

    Args:
        student, teacher: Hugging Face tokenizers.
        names: what the two are called in the message.

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
    one, other = names
    shown = "; ".join(
        f"id {index} is {student_tokens.get(index)!r} to the {one}, {teacher_tokens.get(index)!r} to the {other}"
        for index in differing[:3]
    )
    way_out = "choose a student of the teacher's family, or student.kind=shrink"
    if one != "student":
        way_out = "choose teachers of one family"
    raise InputError(
        f"{one} and {other} have different tokenizers: {len(differing):,} of {len(indices):,} ids differ ({shown}); "
        f"{way_out}"
    )


def align_widths(*, student, teacher, tokenizer) -> str:
    """Gives both rows of logits of one length, where they differ only by the padding of the vocabulary.

    The wider one loses its last classes, in place: the same as logits of -inf there.

    Args:
        student: a Hugging Face model; its last rows of embeddings and head.
        teacher: an `abkd.teachers.teacher.Teacher`.
        tokenizer: of both.

    Returns:
        One line that says what was left out; empty where nothing was.

    Raises:
        InputError: the narrower one has no logit for some token.
    """
    widths = {"student": student.get_output_embeddings().weight.shape[0], "teacher": teacher.vocab}
    narrow, wide = sorted(widths, key=lambda name: widths[name])
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if widths[narrow] < num_tokens:
        raise InputError(
            f"the {narrow} has {widths[narrow]:,} logits a token, and the tokenizer's ids go up to {num_tokens - 1:,}; "
            f"choose a {narrow} made for this tokenizer"
        )
    if widths[narrow] == widths[wide]:
        return ""
    if wide == "student":
        student.resize_token_embeddings(widths[narrow])
    else:
        teacher.narrow(widths[narrow])
    return (
        f"the {wide} has {widths[wide]:,} logits a token and the {narrow} {widths[narrow]:,}: the last "
        f"{widths[wide] - widths[narrow]:,} stand for no token and are left out"
    )
