import json
import math

import numpy as np
import pytest
from conftest import make_llama

from abkd.evaluation.diversity import distinct_n, self_bleu
from abkd.evaluation.exact import final_answer, is_right
from abkd.evaluation.sets import EvaluationSet, bootstrap_interval, evaluate_set
from abkd.generation import Sampling


def test_scores_are_over_seeds_and_prompts(tokenizer, tmp_path):
    model = make_llama(len(tokenizer))
    chosen = EvaluationSet(["The cat likes", "The dog"], [["milk"], ["a", "likes rain"]])
    options = {"num_seeds": 3, "batch_size": 2, "keep": tmp_path / "pets"}
    done = []
    found = evaluate_set(model, tokenizer, chosen, Sampling(8), **options, progress=done.append)
    assert sum(done) == 6 and found["num_prompts"] == 2
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    means = []
    for answers in found["answers"]:
        first = scorer.score("milk", answers[0])["rougeL"].fmeasure
        second = max(scorer.score(right, answers[1])["rougeL"].fmeasure for right in ("a", "likes rain"))
        means.append(100 * (first + second) / 2)
    assert found["mean"] == pytest.approx(np.mean(means)) and found["sd"] == pytest.approx(np.std(means, ddof=1))
    kept = json.loads((tmp_path / "pets-1.json").read_text(encoding="utf-8"))
    assert kept["answers"] == found["answers"][1]
    one = evaluate_set(model, tokenizer, chosen, Sampling(8), num_seeds=1, batch_size=2)
    assert one["sd"] is None and one["answers"][0] == found["answers"][0]


def test_the_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(50, 10, size=400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15) and high == pytest.approx(
        values.mean() + half, abs=0.15
    )
    assert bootstrap_interval([3.0]) == [3.0, 3.0] and bootstrap_interval(values) == [low, high]


def test_exact_match_counts_right_final_answers(tokenizer, monkeypatch):
    from abkd.evaluation import sets
    from abkd.generation import Completion

    texts = ["so it is 1,200.", "no number", r"\boxed{\frac{1}{2}}"]
    monkeypatch.setattr(sets, "generate", lambda *a, **o: [Completion(text, True) for text in texts])
    chosen = EvaluationSet(["q"] * 3, [["#### 1200"], ["#### 3"], ["0.5"]], "exact_match")
    found = evaluate_set(make_llama(len(tokenizer)), tokenizer, chosen, Sampling(1), num_seeds=1, batch_size=1)
    assert found["mean"] == pytest.approx(200 / 3) and found["ended"] == 1


@pytest.mark.parametrize(
    "text, answer",
    [
        ("He has 3 apples and 12 pears.\n#### 15", "15"),
        (r"so \boxed{\frac{a}{b}} and not \boxed{x^{2}}.", "x^{2}"),
        ("first 7, then 1,234.50 dollars", "1,234.50"),
        ("that is -3.", "-3"),
        ("half, so 1/2", "1/2"),
        ("none", ""),
        (r"torn \boxed{1", "1"),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "prediction, reference, right",
    [
        ("#### $1,000", "#### 1000", True),
        ("The answer is 72.0", "48/2 = 24\n#### 72", True),
        (r"\boxed{\dfrac{3}{4}}", r"\boxed{0.75}", True),
        (r"\boxed{\left( 1,2 \right)}", r"\boxed{(1, 2)}", True),
        (r"\boxed{x + 1}", r"\boxed{x+1}", True),
        (r"\boxed{1+x}", r"\boxed{x+1}", False),
        ("71", "#### 72", False),
        ("", "#### 72", False),
        (r"\boxed{12,345}", "#### 12345", True),
        (r"\boxed{50\%}", r"\boxed{50}", True),
        (r"\boxed{\text{Monday}}", r"\boxed{Monday}", True),
    ],
)
def test_answers_are_compared_as_answers(prediction, reference, right):
    assert is_right(prediction, reference) is right


def test_distinct_n():
    texts = ["The cat sat", "the cat ran"]
    assert distinct_n(texts, 1) == 4 / 6 and distinct_n(texts, 2) == 3 / 4
    assert distinct_n(["a"], 2) == 0


def bleu_by_definition(words, references):
    """BLEU of one text, from its definition, slowly."""
    logs = []
    for n in range(1, 5):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if not grams:
            continue
        matched = 0
        for gram in set(grams):
            most = max(sum(tuple(r[i : i + n]) == gram for i in range(len(r) - n + 1)) for r in references)
            matched += min(grams.count(gram), most)
        logs.append(math.log((matched or 0.1) / len(grams)))
    closest = min((len(r) for r in references), key=lambda length: (abs(length - len(words)), length))
    brevity = 1.0 if len(words) >= closest else math.exp(1 - closest / len(words))
    return brevity * math.exp(sum(logs) / len(logs))


def test_self_bleu_is_the_mean_bleu_against_the_others():
    texts = ["the cat sat on the mat", "the cat sat on the the chair", "a dog ran", "the cat", "x", "x"]
    split = [text.split() for text in texts]
    expected = [bleu_by_definition(words, split[:i] + split[i + 1 :]) for i, words in enumerate(split)]
    assert self_bleu(texts) == pytest.approx(100 * np.mean(expected))
    assert self_bleu(["a b c d e"] * 3) == 100
    assert self_bleu(["a b", ""]) == pytest.approx(100 * bleu_by_definition(["a", "b"], [[]]) / 2)
