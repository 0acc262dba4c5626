"""One model on one evaluation set: answers under several sampling seeds, their scores, and how sure they are."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abkd.evaluation.diversity import distinct_n, self_bleu
from abkd.evaluation.exact import is_right
from abkd.evaluation.rouge import rouge_l
from abkd.generation import Sampling, generate

RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts with right answers."""

    prompts: Sequence[str]
    """As the model reads them, template included."""
    references: Sequence[Sequence[str]]
    """Of each prompt, one or more; the best counts."""
    metric: str = "rouge_l"
    """`rouge_l`, or `exact_match` of final answers."""


def evaluate_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: EvaluationSet,
    sampling: Sampling,
    *,
    num_seeds: int,
    batch_size: int,
    keep: Path | None = None,
    progress: Callable[[int], object] = lambda num_done: None,
) -> dict[str, Any]:
    """Answers every prompt once per seed 0, 1, ..., and scores the answers.

    Args:
        keep: where the answers of each seed are kept as soon as they are there, `keep-SEED.json`; found there with the
            same prompts and sampling, they are not made again.
        progress: called with the number of prompts answered.

    Returns:
        `metric`; `mean` (0 to 100) over prompts and seeds; `sd` of the seeds' means, None for one seed; `interval`,
        95 % percentile bootstrap over the prompts of the mean over seeds; `num_prompts`, `num_seeds`; `ended`, the
        share of answers with an end token; `self_bleu` (None for one prompt), `distinct_1`, `distinct_2`, means over
        seeds; `answers`, `[seed][prompt]`.
    """
    prompts = chosen.prompts
    answers, ended = [], []
    for seed in range(num_seeds):
        options = asdict(sampling) | {"seed": seed, "batch_size": batch_size, "prompts": _digest(prompts)}
        file = keep.with_name(f"{keep.name}-{seed}.json") if keep else None
        kept = _read(file, options)
        if kept is None:
            completions = generate(
                model, tokenizer, prompts, **asdict(sampling), batch_size=batch_size, seed=seed, progress=progress
            )
            kept = {"answers": [c.text for c in completions], "ended": [c.finished for c in completions]}
            _write(file, options, kept)
        else:
            progress(len(prompts))
        answers.append(kept["answers"])
        ended.append(kept["ended"])
    scores = np.array([_scores(chosen, each) for each in answers])  # [seeds, prompts]
    return {
        "metric": chosen.metric,
        "mean": float(scores.mean()),
        "sd": float(scores.mean(axis=1).std(ddof=1)) if num_seeds > 1 else None,
        "interval": bootstrap_interval(scores.mean(axis=0)),
        "num_prompts": len(prompts),
        "num_seeds": num_seeds,
        "ended": float(np.mean(ended)),
        "self_bleu": float(np.mean([self_bleu(each) for each in answers])) if len(prompts) > 1 else None,
        "distinct_1": float(np.mean([distinct_n(each, 1) for each in answers])),
        "distinct_2": float(np.mean([distinct_n(each, 2) for each in answers])),
        "answers": answers,
    }


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """The middle 95 % of the means of 2,000 resamples with replacement; always the same ones.

    It says how far the mean may move with other prompts of the same kind; not what another training run would give.
    """
    values = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(values[drawn].mean(axis=1), [tail, 1 - tail])]


def _scores(chosen: EvaluationSet, answers: Sequence[str]) -> list[float]:
    if chosen.metric == "rouge_l":
        return rouge_l(answers, chosen.references)
    return [
        100.0 * any(is_right(answer, reference) for reference in right)
        for answer, right in zip(answers, chosen.references, strict=True)
    ]


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def _read(file: Path | None, options: dict[str, Any]) -> dict[str, Any] | None:
    if file is None or not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept if kept["options"] == options else None


def _write(file: Path | None, options: dict[str, Any], kept: dict[str, Any]) -> None:
    """Renamed into place: the file is whole or absent."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"options": options, **kept}, ensure_ascii=False), encoding="utf-8")
    os.replace(part, file)
