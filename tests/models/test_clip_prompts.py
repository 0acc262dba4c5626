import numpy as np
import pytest
import torch
from tiny_clip import CLASSES, TOKENIZER, make_clip, slow_text, slow_vision

from abkd import InputError
from abkd.data.clip_sets import sentences
from abkd.models.clip_prompts import (
    MEAN,
    SD,
    PromptedText,
    PromptedVision,
    check_context,
    end_positions,
    fitted,
    initial_text,
    initial_vision,
    tokenize,
)

IDS = tokenize(make_clip(), TOKENIZER, sentences(CLASSES))
LENGTHS = [13, 8, 10, 11]


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def standardised(images):
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(SD)[:, None, None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_prompts_features_are_those_of_transformers(attention):
    clip = make_clip(attn_implementation=attention)
    images = torch.rand(5, 3, 32, 32)
    vision, text = PromptedVision(clip, initial_vision(clip, 0, 1)), PromptedText(clip, initial_text(clip, IDS, 0, 1))
    assert torch.equal(vision(images), clip.get_image_features(standardised(images)).pooler_output)
    assert torch.equal(text(IDS), clip.get_text_features(IDS).pooler_output)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_prompts_stand_where_the_slow_towers_put_them(num_tokens, depth):
    clip = make_clip()
    images = torch.rand(2, 3, 32, 32)
    vision_prompts = torch.randn(depth, num_tokens, 32)
    text_prompts = torch.randn(depth, num_tokens, 16)
    found = PromptedVision(clip, vision_prompts)(images)
    expected = torch.stack([slow_vision(clip, image, vision_prompts) for image in standardised(images)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found = PromptedText(clip, text_prompts)(IDS)
    sentences_alone = [row[:length].tolist() for row, length in zip(IDS, LENGTHS, strict=True)]
    expected = torch.stack([slow_text(clip, ids, text_prompts) for ids in sentences_alone])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_initial_text_is_the_sentence_itself_at_depth_1():
    clip = make_clip()
    prompts = initial_text(clip, IDS, 4, 1)
    words = clip.text_model.embeddings.token_embedding(torch.tensor(TOKENIZER("a photo of a")["input_ids"][1:-1]))
    assert torch.equal(prompts[0], words)
    assert torch.equal(PromptedText(clip, prompts)(IDS), clip.get_text_features(IDS).pooler_output)


def test_initial_prompts_are_small_and_normal():
    clip = make_clip(width=128)
    vision, text = initial_vision(clip, 8, 9), initial_text(clip, IDS, 3, 9)
    assert vision.shape == (9, 8, 256) and text.shape == (9, 3, 128)
    for drawn in (vision, text[1:]):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.05) and abs(drawn.mean()) < 1e-3
        assert drawn.abs().max() > 0.05


def test_only_prompts_get_gradients_and_the_tower_stays_in_evaluation_mode():
    clip = make_clip(vision={"attention_dropout": 0.5})
    vision = PromptedVision(clip, initial_vision(clip, 2, 3)).train()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(vision(images), vision(images))
    vision(images).sum().backward()
    assert {name for name, each in vision.named_parameters() if each.grad is not None} == {"prompts"}
    assert (vision.prompts.grad != 0).all() and vision.training and not vision.tower.training


def test_the_prompts_given_are_copied():
    clip, given = make_clip(), torch.randn(2, 3, 32)
    vision = PromptedVision(clip, given)
    vision.prompts.data.zero_()
    assert given.abs().min() > 0


def test_half_precision_towers_and_autocast_run():
    clip = make_clip()
    images = torch.rand(2, 3, 32, 32)
    vision, text = initial_vision(clip, 2, 3), initial_text(clip, IDS, 2, 3)
    image, words = PromptedVision(clip, vision)(images), PromptedText(clip, text)(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        found = PromptedVision(clip, vision)(images), PromptedText(clip, text)(IDS)
    clip.bfloat16()
    found += PromptedVision(clip, vision)(images), PromptedText(clip, text)(IDS)
    for other, exact in zip(found, (image, words) * 2, strict=True):
        assert other.dtype == torch.bfloat16
        assert 0 < (other.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("shape", [(4, 2, 32), (0, 2, 32), (2, 2, 16), (2, 32)])
def test_prompts_of_another_clip_are_refused(shape):
    assert refusal(PromptedVision, make_clip(), torch.zeros(shape)) == (
        f"prompts of shape {list(shape)} do not fit CLIPVisionModel: it takes [depth, tokens, 32] with a depth of 1 "
        "to 3; give prompts made for this CLIP"
    )


def test_sentences_that_begin_otherwise_are_refused():
    clip = make_clip()
    check_context(IDS, 4)
    for ids, num_tokens in ((IDS, 5), (IDS[:1, :4], 4), (tokenize(clip, TOKENIZER, ["cat of a", "dog of a"]), 1)):
        message = refusal(initial_text, clip, ids, num_tokens, 2)
        assert message.startswith(f"num_tokens={num_tokens}: the sentences do not all begin with the same {num_tokens}")


@pytest.mark.parametrize("of_old", [False, True])
def test_both_conventions_of_the_end_token_pool_at_the_same_place(of_old):
    options = {"text": {"eos_token_id": 2}} if of_old else {}
    clip = make_clip(**options)
    assert clip.config.text_config.eos_token_id == (2 if of_old else TOKENIZER.eos_token_id)
    assert end_positions(IDS, clip.config.text_config.eos_token_id).tolist() == [length - 1 for length in LENGTHS]
    expected = make_clip().get_text_features(IDS).pooler_output
    assert torch.equal(PromptedText(clip, initial_text(clip, IDS, 0, 1))(IDS), expected)


def test_padding_with_another_token_changes_nothing():
    clip, padded = make_clip(), IDS.clone()
    for row, length in zip(padded, LENGTHS, strict=True):
        row[length:] = 0
    text = PromptedText(clip, torch.randn(2, 4, 16))
    torch.testing.assert_close(text(padded), text(IDS), rtol=1e-5, atol=1e-5)


def test_a_sentence_without_an_end_is_refused():
    message = refusal(end_positions, torch.tensor([[63, 1, 64], [63, 1, 2]]), 64)
    assert message.startswith("a sentence has no end token (eos_token_id=64 in this CLIP's configuration)")


def test_sentences_too_long_or_none_are_refused():
    clip = make_clip()
    long = "a photo of a " + "x" * 30 + "."
    assert refusal(tokenize, clip, TOKENIZER, ["a photo of a dog.", long]) == (
        f"{long!r} has 37 tokens and this CLIP takes 30; give its class a shorter name"
    )
    assert refusal(tokenize, clip, TOKENIZER, []).startswith("sentences=[]: ")


@pytest.mark.parametrize("height, width", [(50, 40), (40, 61), (20, 20), (33, 32), (64, 64)])
def test_images_of_another_size_are_fitted_as_pillow_does(height, width):
    Image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(80, 176, (height, width, 3), dtype=torch.uint8).numpy()  # Pillow cuts between its passes
    image = Image.fromarray(pixels)
    scale = 32 / min(height, width)
    image = image.resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
    expected = np.asarray(image.crop((left, top, left + 32, top + 32))) / 255
    found = fitted(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, 32)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 1.5 / 255


def test_fitted_images_stay_between_black_and_white():
    found = fitted(torch.rand(1, 3, 20, 20).round(), 32)
    assert found.min() == 0 and found.max() == 1


def test_images_of_the_right_size_are_left_alone_and_no_images_refused():
    images = torch.rand(2, 3, 32, 32)
    assert fitted(images, 32) is images
    for wrong in (images[0], images[:, :1], (255 * images).byte()):
        message = refusal(fitted, wrong, 32)
        assert message.startswith(f"pixel_values: {list(wrong.shape)} of {wrong.dtype} is no batch of images; ")
