import copy
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_llama
from transformers import TrainingArguments

from abkd import AlphaBeta, DistillationTrainer, ForwardKL, InProcessTeacher, InputError, Objective, cli
from abkd.callbacks import MetricsWriter, ProgressBar, StopOnInterrupt, Watch, quiet
from abkd.data.corpus import Corpus
from abkd.data.instructions import Example
from abkd.divergences import AlphaBetaSchedule, Ramp
from abkd.models.students import shrink

GOLDEN = Path(__file__).parent / "golden" / "twenty_steps.json"


def examples(count, tokenizer, seed=0):
    """Prompts and completions of very uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        prompt, completion = torch.randint(2, 12, (2,), generator=generator).tolist()
        ids = torch.randint(5, len(tokenizer), (prompt + completion,), generator=generator).tolist()
        made.append(Example(index, tuple(ids[:prompt]), (*ids[prompt:], 0), "", "", ""))
    return made


def make_trainer(tokenizer, folder, *, student=None, objective=None, teacher="a Llama", count=8, callbacks=(),
                 remember=False, grouped=False, logits="auto", rollouts=None,
                 corpus=None, lm_weight=0.0, pack=False, **options):  # fmt: skip
    arguments = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    model = make_llama(len(tokenizer))
    trainer = DistillationTrainer(
        model=shrink(model, 2) if student is None else student,
        args=TrainingArguments(**(arguments | options)),
        teacher=teacher and InProcessTeacher(model, remember=remember, pack=pack),
        objective=objective or Objective(AlphaBeta(), ce_weight=0.3),
        train_examples=examples(count, tokenizer),
        validation_examples=examples(3, tokenizer, seed=1),
        tokenizer=tokenizer,
        callbacks=callbacks,
        group_by_length=grouped,
        pack=pack,
        rollouts=rollouts,
        corpus=corpus,
        lm_weight=lm_weight,
        logits=logits,
    )
    quiet(trainer)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_the_loss_falls_and_the_student_comes_closer(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, max_steps=30, optim="adamw_torch", learning_rate=5e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert float(losses[-1]) < 0.5 * float(losses[0])
    train_set = trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert train_set["validation_alpha_beta"] < 0.7 * before["validation_alpha_beta"]
    assert set(before) == set(after) >= {"validation_forward_kl", "validation_token_agreement"}


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_one_batch_of_8_equals_4_of_2_uneven_ones_with_sgd(tokenizer, tmp_path, make):
    results = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        student = make(len(tokenizer), layers=2, seed=3)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = make_trainer(
            tokenizer,
            tmp_path,
            student=student,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        start = weights(trainer)
        trainer.train()
        results.append(weights(trainer) - start)
    assert results[0].norm() > 1e-3
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-5 * results[0].norm()


@pytest.mark.parametrize("logits", ["fused", "dense"])
@pytest.mark.parametrize("remember", [False, True])
def test_packed_batches_train_as_padded_ones(tokenizer, tmp_path, logits, remember):
    results = []
    for pack in (False, True):
        trainer = make_trainer(tokenizer, tmp_path, pack=pack, logits=logits, remember=remember, max_steps=4, count=24,
                               per_device_train_batch_size=4, gradient_accumulation_steps=2)  # fmt: skip
        start, rows = weights(trainer), []
        trainer.model.model.register_forward_hook(lambda model, args, output: rows.append(len(output[0])))  # noqa: B023
        trainer.train()
        results.append((weights(trainer) - start, trainer.state.log_history, rows))
    (padded, padded_log, padded_rows), (packed, packed_log, packed_rows) = results
    assert sum(packed_rows) < sum(padded_rows)
    assert (packed - padded).norm() < 1e-4 * padded.norm()
    for one, other in zip(padded_log, packed_log, strict=True):
        for key in {"loss", "kd", "ce", "num_tokens", "masked_share"} & set(one):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4)


def test_the_step_is_sgd_on_the_mean_over_the_counted_tokens(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, objective=Objective(ForwardKL()), gradient_accumulation_steps=2,
                           per_device_train_batch_size=4)  # fmt: skip
    student, teacher = shrink(trainer.teacher.model, 2), trainer.teacher.model
    total, num_tokens = 0.0, 0
    for example in trainer.train_dataset:
        ids = torch.tensor([example.prompt_ids + example.completion_ids])
        start = len(example.prompt_ids) - 1
        q = student(ids).logits[0, start:-1].log_softmax(-1)
        p = teacher(ids).logits[0, start:-1].log_softmax(-1)
        total = total + torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
        num_tokens += len(example.completion_ids)
    (total / num_tokens).backward()
    for parameter in student.parameters():
        parameter.data -= 0.1 * parameter.grad
    trainer.train()
    expected = torch.cat([p.detach().flatten() for p in student.parameters()])
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-4, atol=1e-6)
    logged = trainer.state.log_history[0]
    assert logged["num_tokens"] == num_tokens
    assert float(logged["loss"]) == pytest.approx(total.item() / num_tokens, rel=1e-4)
    assert logged["kd"] == pytest.approx(total.item() / num_tokens, rel=1e-4)


def test_without_a_teacher_the_step_is_sgd_on_the_models_own_loss(tokenizer, tmp_path):
    student = make_llama(len(tokenizer), layers=2, seed=3)
    with pytest.raises(InputError, match="teacher is None, and the objective's kd_weight is above 0"):
        make_trainer(tokenizer, tmp_path, student=student, teacher=None)
    trainer = make_trainer(
        tokenizer, tmp_path, student=student, teacher=None, objective=Objective(kd_weight=0, ce_weight=1)
    )
    assert trainer.how_logits == "logits: fused with the divergence, chunk by chunk"
    expected = copy.deepcopy(trainer.model)
    batch = trainer.data_collator(trainer.train_dataset)
    batch.pop("example_ids")
    expected(**batch).loss.backward()
    for parameter in expected.parameters():
        parameter.data -= 0.1 * parameter.grad
    trainer.train()
    torch.testing.assert_close(weights(trainer), torch.cat([p.detach().flatten() for p in expected.parameters()]))
    assert set(trainer.evaluate()) - {"epoch"} == {
        "validation_next_token_loss",
        "validation_entropy",
        "validation_num_tokens",
    }


def corpus(tokenizer):
    blocks = torch.randint(5, len(tokenizer), (13, 9), generator=torch.Generator().manual_seed(4))
    return Corpus(blocks, seed=3)


@pytest.mark.parametrize("logits", ["dense", "fused"])
def test_the_lm_term_is_the_mean_loss_on_the_corpus(tokenizer, tmp_path, logits):
    student = shrink(make_llama(len(tokenizer)), 2)
    expected = copy.deepcopy(student)
    objective = Objective(kd_weight=0.0, ce_weight=1.0)
    options = {"student": student, "objective": objective, "teacher": None, "logits": logits, "max_steps": 2}
    trainer = make_trainer(tokenizer, tmp_path, **options, corpus=corpus(tokenizer), lm_weight=0.7)
    trainer.train()
    everything = corpus(tokenizer).rows(0, 16)
    for step in (0, 1):
        batch = trainer.data_collator(examples(8, tokenizer))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        blocks = everything[8 * step : 8 * step + 8]
        lm = expected(input_ids=blocks, labels=blocks).loss
        (expected(**inputs, labels=batch["labels"]).loss + 0.7 * lm).backward()
        for parameter in expected.parameters():
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
        assert trainer.state.log_history[step]["lm"] == pytest.approx(lm.item(), rel=1e-4)
    torch.testing.assert_close(
        weights(trainer), torch.cat([p.detach().flatten() for p in expected.parameters()]), rtol=1e-4, atol=1e-5
    )


def test_micro_batches_take_the_blocks_of_the_whole_step(tokenizer, tmp_path):
    found = [
        make_trainer(
            tokenizer,
            tmp_path,
            corpus=corpus(tokenizer),
            lm_weight=2.0,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 2)
    ]
    for trainer in found:
        trainer.train()
    torch.testing.assert_close(*map(weights, found), rtol=1e-4, atol=1e-5)


def test_a_corpus_and_its_weight_go_together(tokenizer, tmp_path):
    with pytest.raises(InputError, match="lm_weight=0 and a corpus go together"):
        make_trainer(tokenizer, tmp_path, corpus=corpus(tokenizer))
    with pytest.raises(InputError, match="lm_weight=1 and a corpus go together"):
        make_trainer(tokenizer, tmp_path, lm_weight=1.0)


def test_the_teacher_is_not_trained_and_a_frozen_head_stays(tokenizer, tmp_path):
    student = shrink(make_llama(len(tokenizer)), 2)
    student.get_input_embeddings().requires_grad_(False)
    trainer = make_trainer(tokenizer, tmp_path, student=student, max_steps=2, remember=True)
    teacher_before = {n: p.clone() for n, p in trainer.teacher.model.named_parameters()}
    head_before, start = student.lm_head.weight.clone(), weights(trainer)
    trainer.train()
    assert all(
        p.grad is None and torch.equal(p, teacher_before[n]) for n, p in trainer.teacher.model.named_parameters()
    )
    assert torch.equal(student.lm_head.weight, head_before)
    assert not torch.equal(weights(trainer), start)


def test_remembered_targets_train_as_computed_ones(tokenizer, tmp_path):
    results = []
    for remember in (False, True):
        trainer = make_trainer(tokenizer, tmp_path, max_steps=4, per_device_train_batch_size=3, remember=remember)
        trainer.train()
        results.append(weights(trainer))
    torch.testing.assert_close(*results)


ADAM = {"optim": "adamw_torch", "learning_rate": 3e-3, "per_device_train_batch_size": 2, "count": 12}


@pytest.mark.parametrize("grouped", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer, tmp_path, grouped):
    options = ADAM | {"max_steps": 19, "lr_scheduler_type": "linear", "grouped": grouped}
    whole = make_trainer(tokenizer, tmp_path / "whole", **options)
    whole.train()
    saved = options | {"save_strategy": "steps", "save_steps": 8}
    first = make_trainer(tokenizer, tmp_path / "parts", **saved)
    first.train()
    second = make_trainer(tokenizer, tmp_path / "parts", **saved)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert torch.equal(weights(whole), weights(first))
    assert torch.equal(weights(whole), weights(second))


def test_twenty_steps_follow_the_golden_curve(tokenizer, tmp_path):
    """ABKD_WRITE_GOLDEN=1 rewrites the curve: for a change of numerics that is meant, with a line in the changelog."""
    trainer = make_trainer(tokenizer, tmp_path, **ADAM, max_steps=20)
    trainer.train()
    curve = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    if os.environ.get("ABKD_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(curve, indent=0) + "\n", encoding="utf-8")
    assert curve == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8")), rel=1e-3)


def test_a_loss_that_is_not_finite_stops_with_a_message(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, max_steps=3)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the loss is nan at step 1; lower training\.learning_rate"):
        trainer.train()


def test_a_torn_checkpoint_is_removed_and_the_earlier_one_stays(tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tokenizer, tmp_path, **ADAM, max_steps=6, save_strategy="steps", save_steps=2)
    save = torch.save

    def full_disk(value, path, *arguments, **options):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(value, path, *arguments, **options)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match=r"checkpoint of step 4 cannot be written .*No space left.*resume=true"):
        trainer.train()
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "WHOLE").exists()


def test_a_gradient_that_is_not_finite_ends_the_training(recipe_file, tmp_path, capsys):
    """The loss of the last step is finite still, but its gradient is not, and the weights are lost."""
    options = ["training.learning_rate=1e30", "training.num_steps=2"]
    assert cli.main(["train", str(recipe_file), *options]) == cli.USERS_MISTAKE
    assert "the gradient is nan at step 2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(tokenizer, tmp_path):
    said = []
    stop = StopOnInterrupt(said.append)
    lines = []

    def interrupt_at_step_3(record):
        lines.append(record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    callbacks = [MetricsWriter(interrupt_at_step_3), stop, ProgressBar("test")]
    trainer = make_trainer(tokenizer, tmp_path, **ADAM, max_steps=9, callbacks=callbacks)
    with stop:
        trainer.train()
    assert threading.current_thread() is threading.main_thread()
    assert stop.interrupted and len(said) == 1
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "WHOLE").exists()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    resumed = make_trainer(tokenizer, tmp_path, **ADAM, max_steps=9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole = make_trainer(tokenizer, tmp_path / "whole", **ADAM, max_steps=9)
    whole.train()
    assert torch.equal(weights(resumed), weights(whole))


def test_the_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    stop = StopOnInterrupt(lambda line: None)
    with pytest.raises(KeyboardInterrupt), stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_alpha_goes_from_its_first_value_to_its_last_and_is_logged(tokenizer, tmp_path):
    objective = Objective(AlphaBetaSchedule(Ramp(0.5, -0.5), 0.5))
    trainer = make_trainer(tokenizer, tmp_path, objective=objective, max_steps=5)
    trainer.train()
    logged = [(line["alpha"], line["beta"]) for line in trainer.state.log_history if "loss" in line]
    assert logged == [(0.5, 0.5), (0.25, 0.5), (0.0, 0.5), (-0.25, 0.5), (-0.5, 0.5)]


@pytest.mark.parametrize("logits", ["dense", "fused"])
def test_the_log_holds_the_rows_figures(tokenizer, tmp_path, logits):
    trainer = make_trainer(tokenizer, tmp_path, logits=logits, max_steps=2, count=2, per_device_train_batch_size=2)
    student, teacher = copy.deepcopy(trainer.model), trainer.teacher.model
    trainer.train()
    line = trainer.state.log_history[0]
    batch = trainer.data_collator(trainer.train_dataset)
    mask = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = (model(**inputs).logits[:, :-1][mask] for model in (student, teacher))
    assert len(q) <= 32  # so that all of them were looked at
    entropy = torch.distributions.Categorical(logits=q).entropy().mean().item()
    assert line["student_entropy"] == pytest.approx(entropy, rel=1e-5)
    entropy = torch.distributions.Categorical(logits=p).entropy().mean().item()
    assert line["teacher_entropy"] == pytest.approx(entropy, rel=1e-5)
    labels = batch["labels"][:, 1:][mask]
    assert line["token_accuracy"] == pytest.approx((q.argmax(-1) == labels).float().mean().item())
    assert line["token_agreement"] == pytest.approx((q.argmax(-1) == p.argmax(-1)).float().mean().item())
    read = int(batch["attention_mask"].sum())
    assert line["masked_share"] == pytest.approx(1 - len(labels) / read)
    assert line["tokens_per_s"] > 0 and 0.05 < line["peak_memory_gib"] < 100 and line["grad_norm"] > 0


def test_without_a_teacher_the_log_has_no_figure_of_one(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, teacher=None, objective=Objective(kd_weight=0, ce_weight=1))
    trainer.train()
    line = trainer.state.log_history[0]
    assert "student_entropy" in line and "token_accuracy" in line
    assert "teacher_entropy" not in line and "token_agreement" not in line


def test_a_student_that_is_the_teacher_is_said(tokenizer, tmp_path):
    said, written = [], []
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        student=make_llama(len(tokenizer)),
        objective=Objective(AlphaBeta()),
        callbacks=[Watch(said.append, written.append)],
    )
    trainer.train()
    (line,) = said
    assert line.startswith("step 1: the divergence is ") and written == [{"step": 1, "warning": line}]
