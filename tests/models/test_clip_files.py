import datetime
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import make_clip
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from abkd import InputError
from abkd.models.clip_files import Prompts, fingerprint, load_prompts, read, save_prompts, write

PROMPTS = Prompts(torch.randn(3, 4, 32), torch.randn(3, 4, 16))


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def published(clip, prompts=PROMPTS) -> dict[str, torch.Tensor]:
    """As PromptSRC names them: the whole model, in half precision, with the class's tokens and the frozen copy."""
    state = {
        "prompt_learner.ctx": prompts.text[0],
        "prompt_learner.token_prefix": torch.zeros(4, 1, 16),
        "prompt_learner.token_suffix": torch.zeros(4, 25, 16),
        "prompt_learner.ZS_image_encoder.class_embedding": torch.zeros(32),
        "image_encoder.VPT": prompts.vision[0],
        "image_encoder.class_embedding": clip.vision_model.embeddings.class_embedding,
        "image_encoder.positional_embedding": clip.vision_model.embeddings.position_embedding.weight,
        "text_encoder.positional_embedding": clip.text_model.embeddings.position_embedding.weight,
        "logit_scale": clip.logit_scale,
    }
    for tower, rows in (("image", prompts.vision), ("text", prompts.text)):
        for layer in range(1, len(rows)):
            state[f"{tower}_encoder.transformer.resblocks.{layer}.VPT_shallow"] = rows[layer]
    return {name: tensor.detach().half() for name, tensor in state.items()}


def save_checkpoint(file, state):
    """With what Dassl pickles beside the weights: the successor of its warm-up schedule, which holds the optimizer."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    schedule = {"successor": CosineAnnealingLR(optimizer, 20.0), "warmup_epoch": 1, "last_epoch": 3}
    beside = {"epoch": 20, "optimizer": optimizer.state_dict(), "scheduler": schedule, "val_result": 81.5}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, **beside}, file)
    return str(file)


@pytest.fixture
def clip():
    return make_clip()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "VLPromptLearner" / "model-best.pth.tar"


def test_a_published_checkpoint_is_read(clip, file):
    found = load_prompts(save_checkpoint(file, published(clip)), clip)
    assert torch.equal(found.vision, PROMPTS.vision.half().float())
    assert torch.equal(found.text, PROMPTS.text.half().float())
    assert found.vision.dtype == found.text.dtype == torch.float32


def test_prompts_of_other_depths_and_numbers_are_read_as_they_are(clip, file):
    prompts = Prompts(torch.randn(1, 2, 32), torch.randn(2, 3, 16))
    found = load_prompts(save_checkpoint(file, published(clip, prompts)), clip)
    assert found.vision.shape == (1, 2, 32) and found.text.shape == (2, 3, 16)


def test_a_bare_state_without_clips_weights_is_read(clip, file):
    state = {name: each for name, each in published(clip).items() if "VPT" in name or name.endswith("ctx")}
    file.parent.mkdir()
    torch.save(state, file)
    assert load_prompts(str(file), clip).text.shape == (3, 4, 16)


LAYER_2 = "image_encoder.transformer.resblocks.2.VPT_shallow"


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            {"prompt_learner.ctx": None},
            "holds no prompt_learner.ctx (1 of 3 prompts of the text encoder are missing); give a teacher that "
            "PromptSRC trained, with prompts in both encoders",
        ),
        (
            {"image_encoder.transformer.resblocks.1.VPT_shallow": None},
            "holds no image_encoder.transformer.resblocks.1.VPT_shallow (1 of 3 prompts of the image encoder are "
            "missing); give a teacher that PromptSRC trained, with prompts in both encoders",
        ),
        (
            {LAYER_2: torch.zeros(2, 32)},
            f"has {LAYER_2} of shape [2, 32] and image_encoder.VPT of [4, 32]; all prompts of a tower are "
            "[tokens, width]",
        ),
        (
            {"image_encoder.transformer.resblocks.3.VPT_shallow": torch.zeros(4, 32)},
            "prompts of shape [4, 4, 32] do not fit CLIPVisionModel: it takes [depth, tokens, 32] with a depth of 1 to "
            "3; give prompts made for this CLIP",
        ),
        (
            {"image_encoder.class_embedding": torch.zeros(48)},
            "was made for another CLIP: image_encoder.class_embedding has the shape [48], in this one [32]; give the "
            "CLIP that it was trained on",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(clip, file, change, reason):
    state = {name: each for name, each in (published(clip) | change).items() if each is not None}
    path = save_checkpoint(file, state)
    assert refusal(load_prompts, path, clip).removeprefix(f"teacher.prompts: {path!r}").lstrip(": ") == reason


def test_prompts_for_a_clip_of_the_same_sizes_and_other_weights_are_refused(clip, file):
    path = save_checkpoint(file, published(clip))
    message = refusal(load_prompts, path, make_clip(seed=1))
    assert message.startswith(f"teacher.prompts: {path!r} was made for another CLIP: image_encoder.class_embedding di")
    assert message.endswith("%; give the one it was trained on")


def test_prompts_for_a_wider_clip_are_refused(file):
    state = {name: each for name, each in published(make_clip()).items() if "VPT" in name or name.endswith("ctx")}
    message = refusal(load_prompts, save_checkpoint(file, state), make_clip(width=32))
    assert "prompts of shape [3, 4, 32] do not fit CLIPVisionModel: it takes [depth, tokens, 64]" in message


def test_a_file_that_is_missing_torn_or_holds_no_weights_is_refused(clip, file):
    assert refusal(load_prompts, str(file), clip) == (
        f"teacher.prompts: there is no {str(file)!r}; give the folder of saved prompts or a published .pth.tar file"
    )
    save_checkpoint(file, published(clip))
    file.write_bytes(file.read_bytes()[:500])
    assert refusal(load_prompts, str(file), clip).startswith(f"teacher.prompts: {file} cannot be read as weights (")
    torch.save([1, 2], file)
    assert refusal(load_prompts, str(file), clip).startswith(f"teacher.prompts: {file} holds no 'state_dict'; ")


def spring(path):
    Path(path).touch()


class Trap:
    def __init__(self, call, *arguments):
        self.made = (call, arguments)

    def __reduce__(self):
        return self.made


def test_objects_beside_the_weights_are_not_brought_to_life(clip, file):
    file.parent.mkdir()
    trap = Trap(spring, file.with_name("caught"))
    torch.save({"state_dict": published(clip) | {"extra": trap}, "made": [datetime.date(2024, 1, 1), trap]}, file)
    assert load_prompts(str(file), clip).vision.shape == (3, 4, 32) and not file.with_name("caught").exists()
    torch.save({"state_dict": published(clip) | {"image_encoder.VPT": trap}}, file)
    assert "holds no image_encoder.VPT (1 of 3 prompts" in refusal(load_prompts, str(file), clip)
    torch.save({"state_dict": published(clip), "made": Trap(os.mkdir, str(file.with_name("caught")))}, file)
    assert refusal(load_prompts, str(file), clip).startswith(f"teacher.prompts: {file} cannot be read as weights (")
    assert not file.with_name("caught").exists()


def test_saved_prompts_come_back_bit_by_bit(clip, tmp_path):
    save_prompts(PROMPTS, tmp_path / "prompts", clip)
    found = load_prompts(str(tmp_path / "prompts"), make_clip())
    assert torch.equal(found.vision, PROMPTS.vision) and torch.equal(found.text, PROMPTS.text)
    assert {each.name for each in (tmp_path / "prompts").iterdir()} == {
        "clip_prompts.safetensors",
        "clip_prompts.json",
    }
    message = refusal(load_prompts, str(tmp_path / "prompts"), make_clip(seed=1))
    assert message == (
        f"teacher.prompts: {str(tmp_path / 'prompts')!r} was made for another CLIP, or one in another precision; give "
        "that one, in float32"
    )


def test_a_folder_of_something_else_is_refused(clip, tmp_path):
    save_prompts(PROMPTS, tmp_path, clip)
    save_file({"vision": PROMPTS.vision}, tmp_path / "clip_prompts.safetensors")
    assert refusal(load_prompts, str(tmp_path), clip) == (
        f"teacher.prompts: {str(tmp_path)!r} holds vision, not vision and text; copy it again"
    )


def test_what_is_written_is_read_and_damage_refused(tmp_path):
    tensors = {"a": torch.randn(3, 2).T, "b": torch.tensor(1.5)}
    write(tmp_path / "x", "kept", tensors, {"names": ["Größe"]})
    found, record = read(tmp_path / "x", "kept", "student.path")
    assert record == {"names": ["Größe"]} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    for damaged in ("{", "[]"):
        (tmp_path / "x" / "kept.json").write_text(damaged, encoding="utf-8")
        assert refusal(read, tmp_path / "x", "kept", "student.path") == (
            f"student.path: {tmp_path / 'x' / 'kept.json'} is not the JSON that abkd wrote; copy the folder again"
        )
    weights = tmp_path / "x" / "kept.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert refusal(read, tmp_path / "x", "kept", "student.path").startswith(f"student.path: {weights} is torn")
    weights.unlink()
    assert refusal(read, tmp_path / "x", "kept", "student.path") == (
        f"student.path: {str(tmp_path / 'x')!r} holds no kept.safetensors; give a folder that abkd saved"
    )


def test_the_fingerprint_is_of_every_weight_and_its_name():
    module, same = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    same.load_state_dict(module.state_dict())
    whole = fingerprint(module)
    assert fingerprint(same) == whole != fingerprint(module, same)
    for tensor in same.state_dict().values():
        tensor.view(-1)[-1] += 1
        assert fingerprint(same) != whole
        tensor.view(-1)[-1] -= 1
    assert fingerprint(nn.ModuleDict({"a": module})) != fingerprint(nn.ModuleDict({"b": module}))
