import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import CLASSES, TOKENIZER, make_clip, slow_text, slow_vision
from torch.nn.functional import cross_entropy

from abkd import InputError
from abkd.data.clip_sets import base_and_new, sentences
from abkd.divergences import AlphaBeta
from abkd.models.clip import (
    CLIPTeacher,
    PromptedCLIP,
    PromptKDStudent,
    accuracy_among,
    load_clip,
    load_clip_student,
    restrict,
    text_features,
)
from abkd.models.clip_files import Prompts
from abkd.models.clip_prompts import MEAN, SD, initial_text, initial_vision, tokenize
from abkd.models.pretrained import load_tokenizer

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(7))
STANDARDISED = (IMAGES - torch.tensor(MEAN)[:, None, None]) / torch.tensor(SD)[:, None, None]
IDS = tokenize(make_clip(), TOKENIZER, sentences(CLASSES))


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_prompted(seed=0):
    clip = make_clip(seed=seed)
    return PromptedCLIP(clip, Prompts(initial_vision(clip, 4, 3), initial_text(clip, IDS, 4, 3)), IDS)


def make_teacher() -> CLIPTeacher:
    """Of another width than the student, with another shared space."""
    clip = make_clip(width=24, shared=20, seed=1)
    torch.manual_seed(1)
    prompts = Prompts(torch.randn(2, 4, 48), torch.randn(2, 4, 24))
    return CLIPTeacher(clip, text_features(clip, prompts.text, IDS), prompts.vision)


def make_student(teacher) -> PromptKDStudent:
    clip = make_clip()
    torch.manual_seed(2)
    return PromptKDStudent(clip, initial_vision(clip, 4, 3), teacher.text_features, teacher.scale, CLASSES)


def changed(before, module) -> set[str]:
    return {name for name, each in module.state_dict().items() if not torch.equal(before[name], each)}


def state_of(module):
    return {name: each.clone() for name, each in module.state_dict().items()}


# logits


def test_without_prompts_logits_are_those_of_transformers():
    clip = make_clip()
    teacher = CLIPTeacher(clip, text_features(clip, initial_text(clip, IDS, 0, 1), IDS), initial_vision(clip, 0, 1))
    prompted = PromptedCLIP(clip, Prompts(initial_vision(clip, 0, 1), initial_text(clip, IDS, 0, 1)), IDS)
    with torch.no_grad():
        expected = clip(input_ids=IDS, pixel_values=STANDARDISED).logits_per_image
    assert torch.equal(teacher(IMAGES), expected)
    assert torch.equal(prompted(IMAGES), expected)


def test_base_classes_alone_are_there_while_prompts_are_trained(tmp_path):
    clip, shape = make_clip(), (4, 3)
    torch.manual_seed(3)
    prompts = Prompts(initial_vision(clip, *shape), initial_text(clip, IDS, *shape))
    prompted = PromptedCLIP(clip, prompts, IDS, num_base=2)
    every = prompted.eval()(IMAGES)
    assert every.shape == (6, 4)
    torch.testing.assert_close(prompted.train()(IMAGES), every[:, :2])
    prompted.save(tmp_path)
    torch.manual_seed(4)
    other = PromptedCLIP(clip, Prompts(initial_vision(clip, *shape), initial_text(clip, IDS, *shape)), IDS).eval()
    assert not torch.equal(other(IMAGES), every)
    other.load(tmp_path)
    assert torch.equal(other(IMAGES), every)


def test_prompted_logits_are_cosines_of_the_slow_towers():
    clip = make_clip()
    prompts = Prompts(torch.randn(2, 4, 32), torch.randn(3, 4, 16))
    image = torch.stack([slow_vision(clip, each, prompts.vision) for each in STANDARDISED])
    ends = (TOKENIZER.eos_token_id == IDS).int().argmax(dim=1) + 1
    text = torch.stack(
        [slow_text(clip, row[:end].tolist(), prompts.text) for row, end in zip(IDS, ends.tolist(), strict=True)]
    )
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    expected = cosines * clip.logit_scale.exp().item()
    teacher = CLIPTeacher(clip, text_features(clip, prompts.text, IDS, batch_size=3), prompts.vision)
    torch.testing.assert_close(teacher(IMAGES).double(), expected, rtol=1e-4, atol=1e-4)
    prompted = PromptedCLIP(clip, prompts, IDS)
    torch.testing.assert_close(prompted(IMAGES).double(), expected, rtol=1e-4, atol=1e-4)
    features = prompted.features(IMAGES)
    for found, raw in zip(features, (image, text), strict=True):
        torch.testing.assert_close(found.double(), raw / raw.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_a_students_logits_are_by_hand():
    teacher = make_teacher()
    student = make_student(teacher).eval()
    norm = student.projection[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    first, last = student.projection[0], student.projection[3]
    prompts = student.vision.prompts.detach()
    image = torch.stack([slow_vision(make_clip(), each, prompts) for each in STANDARDISED])
    hidden = image @ first.weight.double().T + first.bias.double()
    hidden = (hidden - norm.running_mean.double()) / (norm.running_var.double() + norm.eps).sqrt()
    projected = hidden.clamp(min=0) @ last.weight.double().T + last.bias.double()
    cosines = torch.nn.functional.cosine_similarity(projected[:, None], teacher.text_features[None].double(), dim=-1)
    torch.testing.assert_close(student(IMAGES).double(), cosines * teacher.scale.item(), rtol=1e-4, atol=1e-4)


def test_images_of_another_size_are_taken():
    teacher = make_teacher()
    big = torch.nn.functional.interpolate(IMAGES, scale_factor=2.0, mode="nearest")
    assert teacher(big[:, :, :, :50]).shape == (6, 4)
    assert not torch.equal(teacher(big), teacher(IMAGES))


# training


def test_a_training_step_changes_prompts_and_projection_alone():
    teacher = make_teacher()
    student = make_student(teacher).train()
    before, teacher_before = state_of(student), state_of(teacher)
    trained = [each for each in student.parameters() if each.requires_grad]
    names = {name for name, each in student.named_parameters() if each.requires_grad}
    assert names == {"vision.prompts", *(f"projection.{n}.{part}" for n in (0, 1, 3) for part in ("weight", "bias"))}
    teacher_rows = teacher(IMAGES).log_softmax(-1)
    AlphaBeta(0.8, 0.2)(student=student(IMAGES).log_softmax(-1), teacher=teacher_rows).mean().backward()
    gradients = {name: each.grad for name, each in student.named_parameters() if each.grad is not None}
    assert gradients.keys() == names
    torch.optim.SGD(trained, lr=0.1).step()
    before_norm = "projection.0.bias"  # batch norm takes its effect away
    assert all(each.norm() > 0 for name, each in gradients.items() if name != before_norm)
    statistics = {f"projection.1.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed(before, student) | {before_norm} == names | statistics
    assert changed(teacher_before, teacher) == set()


def test_distillation_brings_the_student_to_the_teacher():
    teacher, images = make_teacher(), torch.rand(64, 3, 32, 32)
    student = make_student(teacher).train()
    optimizer = torch.optim.Adam([each for each in student.parameters() if each.requires_grad], lr=0.01)
    target, losses = teacher(images).log_softmax(-1), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = AlphaBeta(0.8, 0.2)(student=student(images).log_softmax(-1), teacher=target).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_teachers_prompts_are_trained_by_cross_entropy_in_both_towers():
    prompted = make_prompted().train()
    before = state_of(prompted)
    names = {"vision.prompts", "text.prompts"}
    assert {name for name, each in prompted.named_parameters() if each.requires_grad} == names
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    optimizer = torch.optim.SGD([each for each in prompted.parameters() if each.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = cross_entropy(prompted(IMAGES), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert changed(before, prompted) == names and losses[-1] < 0.8 * losses[0]
    prompts = prompted.prompts()
    teacher = CLIPTeacher(make_clip(), text_features(make_clip(), prompts.text, IDS), prompts.vision)
    assert torch.equal(teacher(IMAGES), prompted(IMAGES)) and not teacher(IMAGES).requires_grad


def test_the_classes_of_a_teacher_may_be_others_than_those_it_was_trained_on():
    clip, prompts = make_clip(), make_prompted().prompts()
    everything = text_features(clip, prompts.text, IDS)
    base = text_features(clip, prompts.text, tokenize(clip, TOKENIZER, sentences(CLASSES[:2])))
    torch.testing.assert_close(everything[:2], base, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_is_refused_in_training_alone():
    student = make_student(make_teacher())
    assert refusal(student.train(), IMAGES[:1]) == (
        "training.batch_size: 1 image has no batch statistics; use 2 or more, without a last batch of 1"
    )
    assert student.eval()(IMAGES[:1]).shape == (1, 4)


def test_class_names_must_be_one_a_class():
    teacher, clip = make_teacher(), make_clip()
    arguments = (clip, initial_vision(clip, 4, 3), teacher.text_features, teacher.scale, ["cat"])
    assert refusal(PromptKDStudent, *arguments) == "class_names: 1 for 4 classes; give one a class"


# saving


def trained_student():
    student = make_student(make_teacher()).train()
    optimizer = torch.optim.SGD([each for each in student.parameters() if each.requires_grad], lr=0.1)
    cross_entropy(student(IMAGES), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    optimizer.step()
    return student.eval()


def test_a_saved_student_comes_back_bit_by_bit(tmp_path):
    student = trained_student()
    student.save(tmp_path / "student")
    loaded = load_clip_student(tmp_path / "student", make_clip())
    assert torch.equal(loaded(IMAGES), student(IMAGES)) and not loaded.training
    assert loaded.class_names == tuple(CLASSES)
    ours, theirs = loaded.state_dict(), student.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [each.requires_grad for each in loaded.parameters()] == [each.requires_grad for each in student.parameters()]
    record = json.loads((tmp_path / "student" / "clip_student.json").read_text(encoding="utf-8"))
    assert record == {"clip": record["clip"], "num_tokens": 4, "depth": 3, "class_names": CLASSES}


def test_a_state_goes_from_one_student_to_another_without_clips_weights():
    student, other = trained_student(), make_student(make_teacher()).eval()
    state = state_of(student)
    kept = student.trained_state()
    assert not any("tower" in name or "to_shared" in name for name in kept) and "vision.prompts" in kept
    other.load_trained_state(kept)
    assert torch.equal(other(IMAGES), student(IMAGES)) and changed(state, other) == set()
    with pytest.raises(RuntimeError, match=r"Missing key.*vision\.prompts"):
        other.load_trained_state({name: each for name, each in kept.items() if name != "vision.prompts"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_trained_state(kept | {"more": torch.zeros(1)})


def test_the_state_of_a_prompted_clip_is_prompts_and_buffers():
    assert set(make_prompted().trained_state()) == {"vision.prompts", "text.prompts", "token_ids", "scale"}


def test_a_student_for_another_clip_or_in_pieces_is_refused(tmp_path):
    student, folder = trained_student(), tmp_path / "student"
    assert refusal(load_clip_student, folder, make_clip()) == (
        f"student.path: {str(folder)!r} holds no clip_student.safetensors; give a folder that abkd saved"
    )
    student.save(folder)
    assert refusal(load_clip_student, folder, make_clip(seed=5)) == (
        f"student.path: {str(folder)!r} was made for another CLIP, or one in another precision; give that one, in "
        "float32"
    )
    kept = student.trained_state()
    for missing in ("vision.prompts", "projection.3.weight"):
        student.trained_state = lambda left=missing: {name: each for name, each in kept.items() if name != left}
        student.save(folder)
        message = refusal(load_clip_student, folder, make_clip())
        assert message.startswith(f"student.path: {str(folder)!r} holds no whole student (") and missing in message


def test_a_clip_is_loaded_with_its_tokenizer(tmp_path):
    clip = make_clip()
    clip.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_clip(str(tmp_path), "teacher.path")
    assert not loaded.training and loaded.dtype == torch.float32
    ids = tokenize(loaded, load_tokenizer(str(tmp_path), "teacher.path"), sentences(CLASSES))
    assert torch.equal(ids, IDS)
    with torch.no_grad():
        assert torch.equal(loaded(IDS, STANDARDISED).logits_per_image, clip(IDS, STANDARDISED).logits_per_image)


def test_what_is_no_clip_is_refused(tmp_path):
    assert refusal(load_clip, str(tmp_path / "none"), "teacher.path").startswith("teacher.path: there is no folder")
    clip = make_clip()
    clip.vision_model.save_pretrained(tmp_path)
    assert refusal(load_clip, str(tmp_path), "teacher.path") == (
        f"teacher.path: {str(tmp_path)!r} is a clip_vision_model, not a clip; give a whole CLIP model"
    )
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}', encoding="utf-8")
    message = refusal(load_clip, str(tmp_path), "teacher.path")
    assert message.startswith(f"teacher.path: CLIPModel cannot load {str(tmp_path)!r}: ")
    clip.save_pretrained(tmp_path)
    state = clip.state_dict()
    save_file({name: each for name, each in state.items() if "text" not in name}, tmp_path / "model.safetensors")
    assert refusal(load_clip, str(tmp_path), "teacher.path") == (
        f"teacher.path: {str(tmp_path)!r} lacks {sum('text' in name for name in state)} weights of a CLIP, or has them "
        "in another size, first text_model.embeddings.position_embedding.weight; give a whole CLIP model"
    )


# base and new


def test_restricted_logits_and_accuracies():
    logits = torch.tensor([[5.0, 1, 9, 0, 2], [1, 3, 9, 0, 2], [9, 8, 7, 1, 0], [9, 8, 1, 7, 0], [9, 8, 0, 1, 7]])
    labels = torch.tensor([0, 2, 2, 3, 3])
    base, new = base_and_new(5)
    assert restrict(logits, base).tolist() == [row[:3] for row in logits.tolist()]
    assert restrict(logits, [4, 0]).tolist() == [[row[4], row[0]] for row in logits.tolist()]
    assert accuracy_among(logits, labels, base) == pytest.approx(1 / 3)
    assert accuracy_among(logits, labels, new) == pytest.approx(1 / 2)
    assert accuracy_among(logits, labels, range(4, 5)) != accuracy_among(logits, labels, range(4, 5))  # NaN
