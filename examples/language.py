"""Distils a GPT-2 of four layers into one of two, both of bytes and made in memory, in under a minute on a CPU."""

import argparse
import tempfile

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments

from abkd import AlphaBeta, DistillationTrainer, InProcessTeacher, Objective
from abkd.data.instructions import encode, read_instructions
from abkd.paths import find_path

END = "<|end|>"


def byte_tokenizer():
    raw = Tokenizer(
        models.BPE({token: id for id, token in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, [])
    )
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)


def gpt2(vocabulary, layers, seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_positions=192, n_embd=64, n_layer=layers, n_head=4, bos_token_id=0,
                   eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )  # fmt: skip


def trainer_of(model, teacher, objective, tokenizer, examples, *, steps, folder):
    return DistillationTrainer(
        model=model, teacher=teacher, objective=objective, train_examples=examples[16:],
        validation_examples=examples[:16], tokenizer=tokenizer,
        args=TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-3,
                               logging_steps=20, save_strategy="no", report_to="none", disable_tqdm=True,
                               dataloader_pin_memory=False),
    )  # fmt: skip


def print_change(before, after):
    for name in ("alpha_beta", "token_agreement"):
        print(f"{name}: {before[f'validation_{name}']:.4f} before, {after[f'validation_{name}']:.4f} after")


def main(steps):
    tokenizer = byte_tokenizer()
    rows = read_instructions(find_path("package:abkd/recipes/demo/train.jsonl", "data"), "data")
    examples, _ = encode(
        rows, tokenizer, prompt_format="plain", max_prompt_tokens=96, max_tokens=192, long_prompts="drop"
    )
    teacher, student = gpt2(len(tokenizer), 4, seed=0), gpt2(len(tokenizer), 2, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        shared = {"tokenizer": tokenizer, "examples": examples, "steps": steps, "folder": folder}
        trainer_of(teacher, None, Objective(kd_weight=0.0, ce_weight=1.0), **shared).train()
        objective = Objective(AlphaBeta(alpha=0.2, beta=0.7))
        distilling = trainer_of(student, InProcessTeacher(teacher), objective, **shared)
        before, _, after = distilling.evaluate(), distilling.train(), distilling.evaluate()
    print_change(before, after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
