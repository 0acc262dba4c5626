"""Data that the teacher writes: its answers to a recipe's training prompts, for sequence-level distillation."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from abkd import config
from abkd.data.instructions import Instruction, encode_prompt, prompt_text, row_of
from abkd.errors import InputError
from abkd.fit import device_of
from abkd.generation import Sampling, generate_ids
from abkd.inputs import Inputs
from abkd.language_teachers import load_teacher, tokenizer_of
from abkd.parts import make_vllm
from abkd.setup import Say

Prompt = tuple[Instruction, list[int]]


def write_answers(
    recipe: config.LanguageRecipe,
    inputs: Inputs,
    file: Path,
    sampling: Sampling,
    *,
    batch_size: int,
    seed: int,
    say: Say,
    vllm_memory: float | None = None,
) -> None:
    """Writes one row of instruction data for every answer that ends by itself and says something.

    A row has the fields that the recipe reads the prompt from, and `number`, its place among the prompts ordered by
    length. An answer depends on the options and its batch alone, so a run that was stopped goes on to the same file,
    at the first batch that is not there whole. (vLLM's can differ in the last digits, and then in words.)

    Args:
        vllm_memory: vLLM answers with this share of the GPU's memory; None: transformers does.
        file: the data; beside it `file` + `.options.json` says what it was made with.

    Raises:
        InputError: `file` was made with other options, or is not one of these files.
    """
    assert isinstance(recipe.teacher, config.InProcess)
    tokenizer = tokenizer_of(recipe)
    prompts = _prompts(recipe, inputs, tokenizer)
    options = {"teacher": recipe.teacher.model_dump(exclude={"kind", "remember"}), **asdict(sampling)}
    options |= {"batch_size": batch_size, "seed": seed, "prompts": _digest(prompts)}
    options |= {"engine": "transformers" if vllm_memory is None else "vllm"}
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    first = _open(file, options, batch_size)
    if first is None:
        say(f"{file} is finished already")
        return
    say(f"loading the teacher {recipe.teacher.path}")
    model = load_teacher(recipe.teacher)
    generate: Callable[..., list[list[int]]] = generate_ids
    if vllm_memory is not None:
        max_tokens = max(len(ids) for _, ids in prompts) + sampling.max_new_tokens
        dtype = recipe.teacher.dtype
        generate = make_vllm(model, max_tokens=max_tokens, memory=vllm_memory, dtype=dtype, is_fixed=True)
    elif recipe.teacher.quantization == "none":
        model = model.to(device_of(recipe))
    num_left_out = 0
    with (
        file.open("a", encoding="utf-8") as stream,
        tqdm(total=len(prompts), initial=first * batch_size, desc="answers", unit="prompt") as bar,
    ):
        for index in range(first, len(batches)):
            rows, ids = zip(*batches[index], strict=True)
            answers = generate(
                model, ids, sampling, end_id=tokenizer.eos_token_id, batch_size=batch_size, seed=seed + index
            )
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            for number, (row, answer, text) in enumerate(zip(rows, answers, texts, strict=True), index * batch_size):
                if answer[-1] == tokenizer.eos_token_id and text.strip():
                    stream.write(json.dumps(row_of(row, text) | {"number": number}, ensure_ascii=False) + "\n")
                else:
                    num_left_out += 1
            stream.flush()
            bar.update(len(answers))
    say(
        f"{file}: {len(_rows(file)):,} answers; {num_left_out:,} of those written now did not end within "
        f"{sampling.max_new_tokens} tokens or were empty, and are left out"
    )
    _note(_options_file(file), options, finished=True)


def _prompts(recipe: config.LanguageRecipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """What is to be answered, the shortest first: batches of like lengths."""
    data = recipe.data
    prompts = []
    for row in inputs.train:
        text = prompt_text(row, tokenizer, data.prompt_format)
        ids = encode_prompt(text, row.origin, tokenizer, data.max_prompt_tokens, data.long_prompts)
        if ids is not None:
            prompts.append((row, ids))
    if not prompts:
        raise InputError(f"data: every prompt is longer than data.max_prompt_tokens={data.max_prompt_tokens}; raise it")
    return sorted(prompts, key=lambda prompt: len(prompt[1]))


def _digest(prompts: list[Prompt]) -> str:
    return hashlib.sha256(json.dumps([ids for _, ids in prompts]).encode()).hexdigest()[:16]


def _options_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.options.json")


def _note(beside: Path, options: dict[str, Any], *, finished: bool) -> None:
    beside.write_text(json.dumps(options | {"finished": finished}, indent=2) + "\n", encoding="utf-8")


def _open(file: Path, options: dict[str, Any], batch_size: int) -> int | None:
    """The first batch that is still to be written, the file cut back to what is before it; None if it is finished."""
    beside = _options_file(file)
    if not file.exists():
        try:
            _note(beside, options, finished=False)
            file.touch()
        except OSError as error:
            raise InputError(f"output: {str(file)!r} cannot be written ({error.strerror}); give another path") from None
        return 0
    try:
        then = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"output: {str(file)!r} exists and was not made by this command ({beside.name} is missing or torn); "
            "give another path"
        ) from None
    for name, value in options.items():
        if then.get(name) != value:
            raise InputError(
                f"output: {str(file)!r} was started with {name}={then.get(name)!r}, not {value!r}; "
                "go on with the same options, or give another path"
            )
    if then["finished"]:
        return None
    rows = _rows(file)
    first = rows[-1][0] // batch_size if rows else 0
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(b"".join(line for number, line in rows if number < first * batch_size))
    os.replace(part, file)
    return first


def _rows(file: Path) -> list[tuple[int, bytes]]:
    """(number, line) of every line that was written to its end."""
    lines = file.read_bytes().splitlines(keepends=True)
    return [(json.loads(line)["number"], line) for line in lines if line.endswith(b"\n")]
