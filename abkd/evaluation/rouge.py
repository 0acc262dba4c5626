"""ROUGE-L of generated text."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """For each prediction 100 * the F-measure of the longest common subsequence, with the Porter stemmer.

    Args:
        references: for each prediction one or more texts; the best of them counts.

    Returns:
        0 to 100 each.

    Source: Lin, "ROUGE", 2004; stemmer and maximum over references as in the ABKD paper's evaluation.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        100 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in candidates)
        for prediction, candidates in zip(predictions, references, strict=True)
    ]
