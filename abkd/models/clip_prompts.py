"""CLIP's two towers, frozen, with learned prompts at their input and inside (independent vision-language prompting).

Prompts of a tower are one tensor `[depth, tokens, width]`: row 0 is part of the input, row i stands in the place of
what row i - 1 has become before layer i. From layer `depth` on they are left to the tower.

Source: Khattak et al., "Self-regulating prompts" (PromptSRC), ICCV 2023; vision alone, Jia et al., "Visual prompt
    tuning", ECCV 2022.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from abkd.errors import InputError

MEAN, SD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the three channels of CLIP's training images, in 0 to 1."""
INITIAL_SD = 0.02


class PromptedTower(nn.Module):
    """A transformer that stays frozen and in evaluation mode, and the prompts that are learned for it.

    Args:
        tower, to_shared: of a CLIPModel, with the linear map into the space that both towers share; frozen in place.
        prompts: `[depth, tokens, width]` floats, depth >= 1, tokens >= 0 (none: the tower as it is); copied.
        start: the position of the first prompt.

    Raises:
        InputError: there are fewer layers than `depth`, or they have another width.
    """

    def __init__(self, tower: Any, to_shared: nn.Linear, prompts: Tensor, start: int):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.to_shared = to_shared.requires_grad_(False)
        self.start = start  # of the prompts, a position
        check_prompts(prompts, tower, to_shared)
        self.prompts = nn.Parameter(prompts.detach().clone())

    def train(self, mode: bool = True) -> "PromptedTower":
        super().train(mode)
        self.tower.eval()
        return self

    def place(self, hidden: Tensor, row: int) -> Tensor:
        """`hidden` `[batch, positions, width]` with this row's prompts from `start` on; as it is from `depth` on."""
        if row >= len(self.prompts):
            return hidden
        prompts = self.prompts[row].to(hidden.dtype).expand(len(hidden), -1, -1)
        return torch.cat([hidden[:, : self.start], prompts, hidden[:, self.start + prompts.shape[1] :]], dim=1)

    def through_layers(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.tower.encoder.layers):
            if index:
                hidden = self.place(hidden, index)
            hidden = layer(hidden, mask)
        return hidden


class PromptedVision(PromptedTower):
    """features = visual_projection(vision tower(patches, prompts)): prompts come after the last patch.

    Args:
        clip: its vision tower and projection are used and frozen in place.
        prompts: `[depth, tokens, width]`, as `initial_vision` makes them.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, clip: CLIPModel, prompts: Tensor):
        tower = clip.vision_model
        super().__init__(tower, clip.visual_projection, prompts, start=tower.embeddings.num_positions)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("sd", torch.tensor(SD)[:, None, None], persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features `[batch, dim]`, not normalised, of images `[batch, 3, H, W]` in 0 to 1 (see `fitted`)."""
        standard = (fitted(pixel_values, self.tower.config.image_size) - self.mean) / self.sd
        hidden = self.tower.embeddings(standard)
        hidden = self.tower.pre_layrnorm(self.place(hidden, 0))
        hidden = self.through_layers(hidden, mask=None)
        return self.to_shared(self.tower.post_layernorm(hidden[:, 0]))


class PromptedText(PromptedTower):
    """features = text_projection(text tower(start, prompts, rest of the sentence)) at the end token.

    Args:
        clip: its text tower and projection are used and frozen in place.
        prompts: `[depth, tokens, width]`, as `initial_text` makes them; row 0 are word vectors.
    """

    def __init__(self, clip: CLIPModel, prompts: Tensor):
        super().__init__(clip.text_model, clip.text_projection, prompts, start=1)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Features `[sentences, dim]`, not normalised, of sentences `[sentences, length]` (see `tokenize`).

        The tokens at 1 to `tokens` are replaced, whatever they are; those behind the end token are not looked at.
        """
        embeddings, length = self.tower.embeddings, token_ids.shape[1]
        hidden = embeddings(inputs_embeds=self.place(embeddings.token_embedding(token_ids), 0))
        causal = torch.full((length, length), -math.inf, dtype=hidden.dtype, device=hidden.device).triu(1)
        hidden = self.tower.final_layer_norm(self.through_layers(hidden, causal[None, None]))
        ends = end_positions(token_ids, self.tower.config.eos_token_id)
        return self.to_shared(hidden[torch.arange(len(hidden), device=hidden.device), ends])


def check_prompts(prompts: Tensor, tower: Any, to_shared: nn.Linear) -> None:
    """Raises InputError where the tower has fewer layers than the prompts' depth, or another width."""
    layers, width = len(tower.encoder.layers), to_shared.in_features
    if prompts.dim() != 3 or not 1 <= len(prompts) <= layers or prompts.shape[2] != width:
        raise InputError(
            f"prompts of shape {list(prompts.shape)} do not fit {type(tower).__name__}: it takes [depth, tokens, "
            f"{width}] with a depth of 1 to {layers}; give prompts made for this CLIP"
        )


def check_context(token_ids: Tensor, num_tokens: int) -> None:
    """Raises InputError where `num_tokens` prompts would take the place of more than the words all sentences share."""
    context = token_ids[:, 1 : 1 + num_tokens]
    if context.shape[1] < num_tokens or not (context == context[:1]).all():
        raise InputError(
            f"num_tokens={num_tokens}: the sentences do not all begin with the same {num_tokens} tokens; take a "
            "template with as many words before the class name, as in 'a photo of a {}.' for 4"
        )


def initial_vision(clip: CLIPModel, num_tokens: int = 4, depth: int = 9) -> Tensor:
    """normal(0, 0.02) of shape `[depth, num_tokens, width]`, for `PromptedVision`."""
    return torch.randn(depth, num_tokens, clip.config.vision_config.hidden_size) * INITIAL_SD


def initial_text(clip: CLIPModel, token_ids: Tensor, num_tokens: int = 4, depth: int = 9) -> Tensor:
    """Row 0 the word vectors of the sentences' first words, the others normal(0, 0.02), for `PromptedText`.

    Args:
        token_ids: `[sentences, length]` of sentences that all begin with the same `num_tokens` tokens, as those of
            "a photo of a {}." do for 4.

    Returns:
        `[depth, num_tokens, width]`.

    Raises:
        InputError: they do not begin alike.
    """
    check_context(token_ids, num_tokens)
    context = token_ids[0, 1 : 1 + num_tokens]
    words = clip.text_model.embeddings.token_embedding(context).detach()
    inner = torch.randn(depth - 1, num_tokens, words.shape[1]) * INITIAL_SD
    return torch.cat([words[None].float(), inner.to(words.device)])


def tokenize(clip: CLIPModel, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Token ids `[sentences, length]`: start token, words, end token, padding up to the longest.

    Raises:
        InputError: a sentence is longer than CLIP takes, or there is none.
    """
    if not sentences:
        raise InputError("sentences=[]: there is no class to tell apart; give the names of the classes")
    ids = tokenizer(list(sentences), padding=True, return_tensors="pt")["input_ids"]
    most = clip.config.text_config.max_position_embeddings
    if ids.shape[1] > most:
        longest = max(sentences, key=lambda sentence: len(tokenizer(sentence)["input_ids"]))
        raise InputError(
            f"{longest!r} has {ids.shape[1]} tokens and this CLIP takes {most}; give its class a shorter name"
        )
    end_positions(ids, clip.config.text_config.eos_token_id)
    return ids


def end_positions(token_ids: Tensor, eos_token_id: int) -> Tensor:
    """Where each sentence ends, `[sentences]`: its first `eos_token_id`.

    In configurations that say 2, written before transformers 4.31, it is the highest id of the sentence.

    Raises:
        InputError: a sentence has no such token.
    """
    if eos_token_id == 2:
        return token_ids.argmax(dim=-1)
    is_end = token_ids == eos_token_id
    if not is_end.any(dim=-1).all():
        raise InputError(
            f"a sentence has no end token (eos_token_id={eos_token_id} in this CLIP's configuration); use the "
            "tokenizer in the same folder"
        )
    return is_end.int().argmax(dim=-1)


def fitted(pixel_values: Tensor, size: int) -> Tensor:
    """Images `[batch, 3, H, W]` in 0 to 1 as `[batch, 3, size, size]`.

    The shorter side becomes `size`, bicubic and antialiased as in Pillow, and the middle is cut out, as CLIP does.

    Raises:
        InputError: they are not floats of that shape.
    """
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
        raise InputError(
            f"pixel_values: {list(pixel_values.shape)} of {pixel_values.dtype} is no batch of images; give floats in "
            "0 to 1 of shape [batch, 3, height, width]"
        )
    height, width = pixel_values.shape[-2:]
    if (height, width) == (size, size):
        return pixel_values
    shorter = min(height, width)
    height, width = size * height // shorter, size * width // shorter
    resized = nn.functional.interpolate(pixel_values, (height, width), mode="bicubic", antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[..., top : top + size, left : left + size].clamp(0, 1)  # bicubic overshoots
