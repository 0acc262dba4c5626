"""How varied a set of texts is. Words are what white space separates, in lower case."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

Ngram = tuple[str, ...]
ORDERS = (1, 2, 3, 4)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams / all n-grams of the texts together, 0 to 1; 0 where there is none.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", NAACL 2016.
    """
    grams = Counter(gram for text in texts for gram in _ngrams(_words(text), n))
    return len(grams) / max(grams.total(), 1)


def self_bleu(texts: Sequence[str]) -> float:
    """100 * mean over the texts of BLEU-4 with all the others as references; high means that the texts are alike.

    BLEU of a text: the geometric mean of its clipped 1- to 4-gram precisions times the brevity penalty for the
    closest length among the others (the shorter one of two that are equally close). A precision without a match
    counts as 0.1 matches, and one without n-grams is left out; a text without a word counts 0.

    Args:
        texts: two or more; in time linear in their length.

    Source: Zhu et al., "Texygen", SIGIR 2018; BLEU of Papineni et al., ACL 2002; smoothing 1 of Chen and Cherry, 2014.
    """
    words = [_words(text) for text in texts]
    counts = [{n: Counter(_ngrams(each, n)) for n in ORDERS} for each in words]
    two_largest = _two_largest(counts)
    lengths = Counter(map(len, words))
    scores = []
    for index, (each, own) in enumerate(zip(words, counts, strict=True)):
        lengths[len(each)] -= 1
        others = [length for length, count in lengths.items() if count]
        lengths[len(each)] += 1
        scores.append(_bleu(index, each, own, two_largest, others))
    return 100 * sum(scores) / len(scores)


def _bleu(
    index: int, words: list[str], own: dict[int, Counter], two_largest: dict[Ngram, list], others: Sequence[int]
) -> float:
    if not words:
        return 0.0
    logs = []
    for counts in own.values():
        if total := counts.total():
            matched = sum(min(count, _largest_of_others(two_largest[gram], index)) for gram, count in counts.items())
            logs.append(math.log((matched or 0.1) / total))
    closest = min(others, key=lambda length: (abs(length - len(words)), length))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - closest / len(words)))


def _two_largest(counts: Sequence[dict[int, Counter]]) -> dict[Ngram, list]:
    """n-gram -> the two largest (count in a text, index of the text), the largest first."""
    largest: dict[Ngram, list] = defaultdict(lambda: [(0, -1), (0, -1)])
    for index, orders in enumerate(counts):
        for order in orders.values():
            for gram, count in order.items():
                largest[gram] = sorted([*largest[gram], (count, index)], reverse=True)[:2]
    return largest


def _largest_of_others(pair: list, index: int) -> int:
    (count, owner), (second, _) = pair
    return second if owner == index else count


def _words(text: str) -> list[str]:
    return text.lower().split()


def _ngrams(words: Sequence[str], n: int) -> list[Ngram]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
