"""What the Trainer tells while it trains: a log file, a progress bar, a stop with a checkpoint."""

import signal
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from abkd.diagnostics import Diagnosis
from abkd.ranks import gather, num_ranks


class MetricsWriter(TrainerCallback):
    """Hands every log line, step included, to a function."""

    def __init__(self, write: Callable[[dict[str, Any]], None]):
        self.write = write

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "train_runtime" not in logs:
            self.write({"step": state.global_step} | logs)


class Watch(TrainerCallback):
    """Says what `Diagnosis` finds in the log, once each, and writes it beside the figures."""

    def __init__(self, say: Callable[[str], None], write: Callable[[dict[str, Any]], None]):
        self.say, self.write = say, write
        self.diagnosis = Diagnosis()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for words in self.diagnosis.read(state.global_step, logs):
                self.say(words)
                self.write({"step": state.global_step, "warning": words})


class ProgressBar(TrainerCallback):
    """One bar over the steps, with the last logged loss. As a context manager it is closed whatever happens."""

    def __init__(self, description: str):
        self.description = description
        self.bar: tqdm | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.description, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C or SIGTERM ends the training after the current step, with a checkpoint; the second at once.

    Of several ranks one is enough, and all end after the same step; a second signal is then left to the launcher, which
    kills what has not ended half a minute after it has passed the first one on.
    Use as a context manager around `Trainer.train`; `interrupted` says what happened.
    """

    SIGNALS = signal.SIGINT, signal.SIGTERM

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.interrupted = False

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, action in self._previous.items():
            signal.signal(number, action)

    def _on_signal(self, number, frame):
        if self.interrupted:
            if num_ranks() > 1:
                return
            raise KeyboardInterrupt
        self.interrupted = True
        self.say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupted = any(gather(self.interrupted))
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True


class ValidateLast(TrainerCallback):
    """Validates after the last step too, wherever it falls, so that its student can be the best one."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def quiet(trainer: Trainer) -> None:
    """Removes the Trainer's own printing: the bar and metrics.jsonl say it."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
