"""What a training's log says in words: a student that learns nothing, a loss that does not fall, an exploding step."""

from collections import deque
from collections.abc import Mapping
from statistics import fmean, median

WINDOW = 15
"""Log lines: the first so many are compared with the latest so many."""


class Diagnosis:
    """Reads the log line by line; each trouble is said once, a divergence that does not fall twice at most."""

    def __init__(self):
        self._said: set[str] = set()
        self._first: list[float] = []
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._num_lines = 0

    def read(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """Lines for the user, most often none.

        Args:
            logs: a line of metrics.jsonl; those without a loss are passed over.
        """
        if "loss" not in logs:
            return []
        self._num_lines += 1
        found = {
            "nothing counted": self._nothing_counted(logs),
            "same": self._same_as_the_teacher(logs),
            "norm": self._gradient(logs),
            f"falls {self._num_lines // (8 * WINDOW) > 0}": self._does_not_fall(logs),
        }
        new = {name: words for name, words in found.items() if words and name not in self._said}
        self._said |= set(new)
        return [f"step {step}: {words}" for words in new.values()]

    def _nothing_counted(self, logs: Mapping[str, float]) -> str:
        if logs.get("num_tokens", 1) > 0:
            return ""
        return "no token of the batch counted, so nothing was learnt; look at the completions and data.max_tokens"

    def _same_as_the_teacher(self, logs: Mapping[str, float]) -> str:
        if self._num_lines > 1 or logs.get("ce", 0) > 0 or not abs(logs.get("kd", 1)) < 1e-6:
            return ""
        return (
            f"the divergence is {logs['kd']:.1e} before any training: the student gives the teacher's distribution "
            "already; is student.path the teacher?"
        )

    def _gradient(self, logs: Mapping[str, float]) -> str:
        norm = logs.get("grad_norm")
        if norm is None:
            return ""
        usual = median(self._norms) if len(self._norms) == WINDOW else None
        self._norms.append(norm)
        if norm == 0:
            return "the gradient is 0: nothing reaches the student; is all of it frozen?"
        if usual and norm > 100 * usual:
            return (
                f"the gradient norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}; if the loss rises, "
                "lower training.learning_rate"
            )
        return ""

    def _does_not_fall(self, logs: Mapping[str, float]) -> str:
        value = logs.get("kd") or logs.get("ce") or logs["loss"]
        if len(self._first) < WINDOW:
            self._first.append(value)
            return ""
        self._latest.append(value)
        if self._num_lines not in (4 * WINDOW, 8 * WINDOW) or fmean(self._latest) < fmean(self._first):
            return ""
        return (
            f"the loss term has not fallen: its mean is {fmean(self._latest):.4g} over the last {WINDOW} log lines and "
            f"was {fmean(self._first):.4g} over the first; try another training.learning_rate"
        )
