"""A CLIP of random weights, its tokenizer made in memory, and the same towers once more, slowly, in fp64."""

import string

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

CLASSES = ["tabby_cat", "dog", "fox", "a hen"]


def make_tokenizer(words=("photo", "of", "cat", "dog")) -> CLIPTokenizer:
    letters = string.ascii_lowercase + "."
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)


TOKENIZER = make_tokenizer()


def make_clip(width: int = 16, layers: int = 3, shared: int = 12, seed: int = 0, **options) -> CLIPModel:
    """Vision is twice as wide as text; large weights, so that every position matters."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 2}
    text = {"hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": 30, **sizes}
    ends = {"eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": TOKENIZER.bos_token_id}
    vision = {"hidden_size": 2 * width, "intermediate_size": 3 * width, "image_size": 32, "patch_size": 8, **sizes}
    config = CLIPConfig(
        text_config={**text, "vocab_size": len(TOKENIZER), **ends, **options.pop("text", {})},
        vision_config={**vision, **options.pop("vision", {})},
        projection_dim=shared,
        **options,
    )
    clip = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 0:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return clip


def slow_layer(layer, hidden, causal: bool):
    """One sentence or image, `[positions, width]`, head by head and position by position."""

    def linear(module, x):
        return x @ module.weight.double().T + module.bias.double()

    attention = layer.self_attn
    x = slow_norm(layer.layer_norm1, hidden)
    queries, keys, values = (linear(getattr(attention, f"{name}_proj"), x) for name in "qkv")
    mixed = torch.zeros_like(x)
    size = x.shape[1] // attention.num_heads
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        for here in range(len(x)):
            seen = slice(0, here + 1 if causal else len(x))
            scores = (keys[seen, part] @ queries[here, part]) / size**0.5
            weights = (scores - scores.max()).exp()
            mixed[here, part] = (weights / weights.sum()) @ values[seen, part]
    hidden = hidden + linear(attention.out_proj, mixed)
    inner = linear(layer.mlp.fc1, slow_norm(layer.layer_norm2, hidden))
    return hidden + linear(layer.mlp.fc2, inner / (1 + (-1.702 * inner).exp()))


def slow_norm(module, x):
    centred = x - x.mean(dim=-1, keepdim=True)
    sd = (centred.square().mean(dim=-1, keepdim=True) + module.eps).sqrt()
    return centred / sd * module.weight.double() + module.bias.double()


@torch.no_grad()
def slow_vision(clip, standardised, prompts):
    """Features of one image `[3, 32, 32]`, already standardised."""
    tower = clip.vision_model
    kernel = tower.embeddings.patch_embedding.weight.double().flatten(1)
    rows = [tower.embeddings.class_embedding.double()]
    for top in range(0, 32, 8):
        rows += [
            kernel @ standardised[:, top : top + 8, left : left + 8].double().flatten() for left in range(0, 32, 8)
        ]
    hidden = torch.stack(rows) + tower.embeddings.position_embedding.weight.double()
    hidden = slow_norm(tower.pre_layrnorm, torch.cat([hidden, prompts[0].double()]))
    for index, layer in enumerate(tower.encoder.layers):
        if 0 < index < len(prompts):
            hidden[17:] = prompts[index].double()
        hidden = slow_layer(layer, hidden, causal=False)
    return clip.visual_projection.weight.double() @ slow_norm(tower.post_layernorm, hidden)[0]


@torch.no_grad()
def slow_text(clip, ids, prompts):
    """Features of one sentence, a list of ids up to its end token."""
    tower = clip.text_model
    hidden = tower.embeddings.token_embedding.weight.double()[ids]
    hidden[1 : 1 + prompts.shape[1]] = prompts[0].double()
    hidden = hidden + tower.embeddings.position_embedding.weight.double()[: len(ids)]
    for index, layer in enumerate(tower.encoder.layers):
        if 0 < index < len(prompts):
            hidden[1 : 1 + prompts.shape[1]] = prompts[index].double()
        hidden = slow_layer(layer, hidden, causal=True)
    return clip.text_projection.weight.double() @ slow_norm(tower.final_layer_norm, hidden)[-1]
