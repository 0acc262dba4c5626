"""A teacher's hidden states are written down once; a student then learns from them, without the teacher in memory."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from language import byte_tokenizer, gpt2, print_change, trainer_of

from abkd import AlphaBeta, CachedTeacher, Objective
from abkd.data.instructions import encode, read_instructions
from abkd.paths import find_path

DATA = "package:abkd/recipes/demo/train.jsonl"
TEXTS = {"prompt_format": "plain", "max_prompt_tokens": 96, "max_tokens": 192, "long_prompts": "drop"}


def write_cache(folder):
    """With the command line, as on the machine that has the teacher."""
    torch.manual_seed(0)
    teacher, tokenizer = gpt2(len(byte_tokenizer()), 4, seed=0), byte_tokenizer()
    teacher.lm_head.weight.data *= 3  # a teacher that is sure of something
    for each in (teacher, tokenizer):
        each.save_pretrained(folder / "teacher")
    recipe = {
        "task": "language_model", "run_dir": "unused", "objective": {"divergence": {"kind": "alpha_beta"}},
        "teacher": {"path": str(folder / "teacher")}, "student": {"kind": "shrink", "keep_layers": 2},
        "data": {"train": DATA, "num_held_out": 16, **TEXTS}, "training": {"num_steps": 1, "learning_rate": 0.002},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["cache", folder / "recipe.yaml", "--targets", "hidden", "--output", folder / "cache"]
    subprocess.run([sys.executable, "-m", "abkd", *command], check=True, capture_output=True)


def main(steps):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(folder)
        tokenizer = byte_tokenizer()
        examples, _ = encode(read_instructions(find_path(DATA, "data"), "data"), tokenizer, **TEXTS)
        teacher = CachedTeacher.open(folder / "cache")
        teacher.expect(examples, {"data.train": DATA})
        student, objective = gpt2(len(tokenizer), 2, seed=1), Objective(AlphaBeta(alpha=0.2, beta=0.7))
        training = trainer_of(student, teacher, objective, tokenizer, examples, steps=steps, folder=str(folder / "run"))
        before, _, after = training.evaluate(), training.train(), training.evaluate()
    print_change(before, after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
