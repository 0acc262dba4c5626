"""Distils a GPT-2 of bytes into a smaller one in a loop of our own; of abkd there is the divergence alone."""

import argparse
import json
from importlib.resources import files

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from abkd import alpha_beta

END, LENGTH = 256, 192


def gpt2(layers):
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=END + 1, n_positions=LENGTH, n_embd=64, n_layer=layers, n_head=4, bos_token_id=END,
                   eos_token_id=END, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )  # fmt: skip


def read_texts():
    """int64 `[rows, LENGTH]`, filled with END, and bool `[rows, LENGTH - 1]`: where the next byte is the answer's."""
    ids, is_answer = [], []
    for line in files("abkd").joinpath("recipes/demo/train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = [*row["prompt"].encode()], [*row["completion"].encode(), END]
        if len(prompt) < LENGTH // 2:
            text = (prompt + answer)[:LENGTH]
            ids.append(text + [END] * (LENGTH - len(text)))
            is_answer.append([len(prompt) <= place < len(text) for place in range(1, LENGTH)])
    return torch.tensor(ids), torch.tensor(is_answer)


def logits_of(model, ids, mask):
    """`[counted bytes, END + 1]`"""
    return model(ids).logits[:, :-1][mask]


def divergence(student_logits, teacher_logits):
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return alpha_beta(student=q, teacher=p, alpha=0.2, beta=0.7).mean()


def train(model, loss_of, ids, mask, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(ids), (8,))
        optimizer.zero_grad()
        loss_of(ids[rows], mask[rows]).backward()
        optimizer.step()


def main(steps):
    torch.manual_seed(0)
    teacher, student, (ids, mask) = gpt2(4), gpt2(2), read_texts()
    held_out, ids, mask = (ids[:16], mask[:16]), ids[16:], mask[16:]

    def next_byte(ids, mask):
        return cross_entropy(logits_of(teacher, ids, mask), ids[:, 1:][mask])

    def from_teacher(ids, mask):
        with torch.no_grad():
            target = logits_of(teacher, ids, mask)
        return divergence(logits_of(student, ids, mask), target)

    train(teacher, next_byte, ids, mask, steps)
    print(f"alpha_beta: {from_teacher(*held_out):.4f} before")
    train(student, from_teacher, ids, mask, steps)
    print(f"alpha_beta: {from_teacher(*held_out):.4f} after")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
