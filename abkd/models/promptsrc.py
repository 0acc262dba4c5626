"""What keeps prompts near the CLIP they are learned for: PromptSRC's constraints and its average over epochs.

Source: Khattak et al., "Self-regulating prompts: foundational model adaptation without forgetting" (PromptSRC), ICCV
    2023, with the weights of its base-to-new recipe.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from abkd.divergences import forward_kl
from abkd.models.clip_files import Prompts


def self_regularization(
    *,
    image: Tensor,
    frozen_image: Tensor,
    text: Tensor,
    frozen_text: Tensor,
    scale: Tensor,
    image_weight: float = 10.0,
    text_weight: float = 25.0,
) -> Tensor:
    """image_weight mean|image - frozen_image| + text_weight mean|text - frozen_text| + KL(frozen, prompted) / classes.

    Added to the cross-entropy of `PromptedCLIP` while it is trained. The divergence, in nats, is between the softmaxes
    of the logits of frozen CLIP and of the prompted one; its mean is over the batch.

    Args:
        image, frozen_image: `[batch, dim]` unit vectors, of `PromptedCLIP.features` and of CLIP without prompts.
        text, frozen_text: `[classes, dim]` unit vectors; the published frozen ones are means over 60 templates.
        scale: CLIP's, as `PromptedCLIP.scale`.
        image_weight, text_weight: >= 0.

    Returns:
        A scalar.
    """
    prompted, frozen = (
        (scale * (images @ texts.T)).log_softmax(dim=-1)
        for images, texts in ((image, text), (frozen_image, frozen_text))
    )
    return (
        image_weight * (image - frozen_image).abs().mean()
        + text_weight * (text - frozen_text).abs().mean()
        + forward_kl(student=prompted, teacher=frozen).mean() / len(text)
    )


def epoch_weights(num_epochs: int, mean: float = 15.0, sd: float = 1.0) -> list[float]:
    """exp(-(epoch - mean)^2 / (2 sd^2)) of epochs 1 to `num_epochs`, divided by their sum.

    Args:
        mean, sd: in epochs; of a training of 20.
    """
    epochs = torch.arange(1, num_epochs + 1, dtype=torch.float64)
    return torch.softmax(-((epochs - mean) / sd).square() / 2, dim=0).tolist()


def weighted_average(prompts: Sequence[Prompts], weights: Sequence[float]) -> Prompts:
    """sum_i weights[i] prompts[i], of prompts after each epoch and `epoch_weights`."""
    pairs = list(zip(prompts, weights, strict=True))
    return Prompts(
        vision=torch.stack([weight * each.vision for each, weight in pairs]).sum(dim=0),
        text=torch.stack([weight * each.text for each, weight in pairs]).sum(dim=0),
    )
