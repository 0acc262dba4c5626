"""The command line, in this process: what it prints, what it writes, how it ends. No check waits for torch."""

import contextlib
import io
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import make_llama, make_tokenizer, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from abkd.cli import main
from abkd.recipe import RECIPES, read_recipe
from abkd.rundir import RunDir

OVERRIDES = ("evaluation.num_generated=2", "evaluation.max_new_tokens=4", "training.validate_every=2")


class Done(NamedTuple):
    code: int
    out: str
    err: str


def abkd(*arguments) -> Done:
    """`abkd ARGUMENTS`; a refusal by argparse counts as its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return Done(code, out.getvalue(), err.getvalue())


def refusal(*arguments) -> str:
    """The one line with which a command is refused."""
    done = abkd(*arguments)
    lines = [line for line in done.err.splitlines() if line.startswith("abkd: ")]
    assert done.code == 2 and len(lines) == 1, done
    return lines[0].removeprefix("abkd: ")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


class Trained(NamedTuple):
    path: Path
    recipe_file: Path
    done: Done


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_folder, data_file) -> Trained:
    """One run of the tiny recipe, by `abkd train`."""
    folder = tmp_path_factory.mktemp("cli")
    file = write_recipe(folder, teacher_folder, data_file)
    return Trained(folder / "run", file, abkd("train", file, *OVERRIDES))


# Training


def test_train_ends_well_and_prints_the_table(run):
    assert run.done.code == 0, run.done.err
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in run.done.out.splitlines()]
    rows = {row[0]: row for row in cells if row}
    assert list(rows) == ["teacher", "before", "after"]
    measured = results(run.path)
    for name, row in rows.items():
        assert row[1:4] == [f"{measured[name][key]:.3f}" for key in ("forward_kl", "reverse_kl", "alpha_beta")]
        assert f"{measured[name]['num_parameters']:,}" in row
    assert f"the student is in {run.path / 'student'}" in run.done.out
    assert "train: 8 examples, " in run.done.out


def test_the_run_folder_holds_the_resolved_recipe_and_the_environment(run):
    recipe = read_recipe(str(run.path / "recipe.yaml"))
    assert recipe == read_recipe(str(run.recipe_file), OVERRIDES)
    assert (run.path / "recipe.yaml").read_text(encoding="utf-8") == recipe.to_yaml()
    assert RunDir(run.path).read_json("environment.json")["versions"]["torch"] == torch.__version__


def test_metrics_have_a_line_per_step_and_per_validation(run):
    lines = metrics(run.path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation_forward_kl" in line] == [2, 4]
    recipe = read_recipe(str(run.path / "recipe.yaml"))
    for line in lines:
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["kd"], rel=1e-5) and line["num_tokens"] > 0
    assert lines[0]["learning_rate"] == pytest.approx(recipe.training.learning_rate)


def test_results_say_what_training_changed(run):
    measured = results(run.path)
    assert measured["divergence"] == "AlphaBeta(alpha=0.2, beta=0.7)" and measured["num_steps"] == 4
    assert measured["teacher"]["alpha_beta"] == pytest.approx(0, abs=1e-6)
    assert measured["teacher"]["token_agreement"] == 1
    assert 0 < measured["after"]["alpha_beta"] < measured["before"]["alpha_beta"]
    last = [line for line in metrics(run.path) if "validation_alpha_beta" in line][-1]
    assert last["validation_alpha_beta"] == pytest.approx(measured["after"]["alpha_beta"], rel=1e-5)
    assert len(measured["after"]["answers"]) == 2 and 0 <= measured["after"]["rouge_l"] <= 100


def test_the_student_loads_in_plain_transformers(run, teacher_folder, tokenizer):
    student = AutoModelForCausalLM.from_pretrained(run.path / "student")
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    assert student.config.num_hidden_layers == 2
    assert student.lm_head.weight is student.model.embed_tokens.weight
    first, theirs = student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(first, theirs) and torch.allclose(first, theirs, atol=0.01)
    loaded = AutoTokenizer.from_pretrained(run.path / "student")
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
    prompt = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=True)
    assert student.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_resolved_recipe_repeats_the_run(run, tmp_path):
    done = abkd("train", run.path / "recipe.yaml", f"run_dir={tmp_path / 'again'}")
    assert done.code == 0, done.err
    lines = metrics(tmp_path / "again"), metrics(run.path)
    for line in itertools.chain(*lines):
        line.pop("tokens_per_s", None), line.pop("peak_memory_gib", None)
    assert lines[0] == lines[1]
    first, second = results(run.path), results(tmp_path / "again")
    for timed in (first, second):
        del timed["training_s"]
    assert first == second


def test_a_run_is_never_written_over(run):
    before = (run.path / "results.json").stat().st_mtime_ns
    assert refusal("train", run.recipe_file) == (
        f"run_dir: {str(run.path)!r} exists and is never written over; "
        "give another with run_dir=PATH, or go on with it by resume=true"
    )
    assert (run.path / "results.json").stat().st_mtime_ns == before


def test_resuming_a_finished_run_prints_its_table_again(run):
    done = abkd("train", run.path / "recipe.yaml", "resume=true")
    assert done.code == 0 and f"{run.path} is finished already" in done.out
    assert f"{results(run.path)['after']['forward_kl']:.3f}" in done.out


def test_an_interrupted_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    log = RunDir.log

    def log_and_interrupt(self, record):
        log(self, record)
        if record["step"] == 2 and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    arguments = ("train", run.recipe_file, *OVERRIDES, f"run_dir={tmp_path / 'run'}")
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "log", log_and_interrupt)
        done = abkd(*arguments)
    assert done.code == 130
    assert f"go on with: abkd train {tmp_path / 'run' / 'recipe.yaml'} resume=true" in done.out
    assert not (tmp_path / "run" / "results.json").exists()
    assert refusal("eval", tmp_path / "run") == (
        f"target: {str(tmp_path / 'run')!r} has no student yet; finish it with resume=true"
    )
    done = abkd("train", tmp_path / "run" / "recipe.yaml", "resume=true")
    assert done.code == 0, done.err
    losses, expected = ([m["loss"] for m in metrics(path) if "loss" in m] for path in (tmp_path / "run", run.path))
    assert losses == expected
    assert results(tmp_path / "run")["after"] == results(run.path)["after"]


def test_ctrl_c_outside_of_training_ends_with_130(recipe_file, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("abkd.inputs.read_instructions", interrupt)
    done = abkd("check", recipe_file)
    assert (done.code, done.err) == (130, "\nabkd: interrupted\n")


def test_a_defect_of_ours_is_not_disguised_as_the_users_mistake(recipe_file, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("ours")

    monkeypatch.setattr("abkd.inputs.read_instructions", fail)
    with pytest.raises(ValueError, match="ours"):
        main(["check", str(recipe_file)])


# Refusals that need the tokenizer or the models; nothing may be left behind


@pytest.fixture
def other_student(tmp_path):
    """A checkpoint whose tokenizer is not the teacher's."""
    tokenizer = make_tokenizer(corpus=["zzz yyy xxx www"])
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_prompt_tokens=3", "tokens, data.max_prompt_tokens is 3; raise it, or set data.long_prompts=drop"),
        ("student={kind: shrink, layers: [0, 4]}", "student.layers=[0, 4]: must rise, between 0 and 3, as the teacher"),
        ("student.keep_layers=9", "student.keep_layers=9: the teacher has 4 layers; use 1 to 4"),
        ("student={kind: pretrained, path: OTHER}", "student and teacher have different tokenizers: "),
    ],
    ids=["a long prompt", "a layer too high", "too many layers", "another tokenizer"],
)
def test_what_the_models_refuse_leaves_no_run_folder(recipe_file, other_student, tmp_path, override, message):
    assert message in refusal("train", recipe_file, override.replace("OTHER", str(other_student)))
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_width_loses_its_padding_and_says_so(recipe_file, tokenizer, tmp_path):
    make_llama(len(tokenizer) + 6).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    done = abkd("train", recipe_file, "student.kind=pretrained", f"student.path={tmp_path / 'wide'}")
    assert done.code == 0, done.err
    line = f"the student has {len(tokenizer) + 6} logits a token and the teacher {len(tokenizer)}: the last 6 stand for"
    assert done.out.count(line) == 1
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert trained.get_output_embeddings().weight.shape[0] == trained.config.vocab_size == len(tokenizer)


def test_supervised_fine_tuning_is_train_without_a_teacher(recipe_file, tokenizer, tmp_path):
    make_llama(len(tokenizer), layers=1, seed=5).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    fine_tuning = [
        "teacher=null", "objective={kd_weight: 0, ce_weight: 1}", "training.learning_rate=0.01", "training.num_steps=8",
        f"student={{kind: pretrained, path: {tmp_path / 'small'}}}", "evaluation.num_generated=2",
    ]  # fmt: skip
    done = abkd("train", recipe_file, *fine_tuning)
    assert done.code == 0, done.err
    assert "loading the teacher" not in done.out and "next-token" in done.out and "forward KL" not in done.out
    found = results(tmp_path / "run")
    assert "teacher" not in found and found["divergence"] is None and "rank_mass" not in found["after"]
    assert found["after"]["next_token_loss"] < 0.8 * found["before"]["next_token_loss"]
    assert len(found["after"]["answers"]) == 2 and "token_agreement" not in found["after"]
    first = metrics(tmp_path / "run")[0]
    assert first["ce"] == pytest.approx(first["loss"], rel=1e-5) and first["kd"] == 0
    again = abkd("eval", tmp_path / "run", "--json")
    assert again.code == 0, again.err
    measured = json.loads(again.out)["student"]
    assert measured["next_token_loss"] == pytest.approx(found["after"]["next_token_loss"], rel=1e-5)


def test_a_student_of_chosen_layers(recipe_file, teacher_folder, tmp_path):
    done = abkd("train", recipe_file, "student={kind: shrink, layers: [0, 1, 3]}")
    assert done.code == 0, done.err
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert trained.config.num_hidden_layers == 3


def test_a_pretrained_student_with_frozen_embeddings_keeps_them(recipe_file, teacher_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    small = make_llama(len(tokenizer), layers=1, seed=5)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    student = f"student={{kind: pretrained, path: {tmp_path / 'small'}, freeze_embeddings: true}}"
    kind = "objective.divergence.kind=forward_kl"
    done = abkd("train", recipe_file, student, kind, "objective.ce_weight=0.5", "data.prompt_format=plain")
    assert done.code == 0, done.err
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert torch.equal(trained.model.embed_tokens.weight, small.model.embed_tokens.weight)
    assert not torch.equal(trained.model.norm.weight, small.model.norm.weight)
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["kd"] + 0.5 * line["ce"], rel=1e-5) and line["ce"] > 0
    assert results(tmp_path / "run")["divergence"] == "ForwardKL()"


def test_dropped_prompts_and_cut_completions_are_counted(recipe_file, data_file, tmp_path):
    rows = [("cat", "milk"), ("cat " * 99, "milk"), ("hen", "sun " * 199), ("dog " * 99, "sun"), ("fox", "rain")]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in rows]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    files = (f"data.train={tmp_path / 'rows.jsonl'}", f"data.validation={data_file}")
    done = abkd("train", recipe_file, *files, "data.long_prompts=drop", "training.num_steps=1")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("train: ")]
    assert line.startswith("train: 3 examples, ") and line.endswith(" 1 completions cut, 2 long prompts dropped")


# Evaluation


def test_eval_of_a_run_measures_its_student(run):
    done = abkd("eval", run.path, "--json")
    assert done.code == 0, done.err
    measured, expected = json.loads(done.out), results(run.path)
    assert measured == {key: expected[old] for key, old in (("teacher",) * 2, ("before",) * 2, ("student", "after"))}
    assert "loading the teacher" in done.err


def test_eval_prints_a_table(run):
    done = abkd("eval", run.path, "evaluation.num_generated=0")
    assert done.code == 0, done.err
    after = results(run.path)["after"]
    (row,) = [line for line in done.out.splitlines() if line.startswith("│ student")]
    assert f"{after['forward_kl']:.3f}" in row and f"{after['token_agreement']:.1%}" in row


@pytest.mark.parametrize("position", ["before the option", "after the option"])
def test_eval_of_a_model_folder_goes_by_a_recipe_with_overrides_anywhere(run, teacher_folder, position):
    override, option = ["data.max_validation_rows=2"], ["--recipe", run.recipe_file]
    rest = [*override, *option] if position == "before the option" else [*option, *override]
    done = abkd("eval", teacher_folder, *rest, "--json")
    assert done.code == 0, done.err
    measured = json.loads(done.out)
    assert measured["student"] == measured["teacher"]
    assert measured["student"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert measured["student"]["num_tokens"] < results(run.path)["after"]["num_tokens"]


SETS = ("evaluation.sets.pets.max_rows=3", "evaluation.temperature=1", "evaluation.num_seeds=2",
        "evaluation.max_new_tokens=6", "evaluation.num_generated=0")  # fmt: skip


def test_runs_side_by_side_on_evaluation_sets(run, recipe_file, data_file, tmp_path):
    other = tmp_path / "other"
    assert abkd("train", recipe_file, *OVERRIDES, "objective.divergence.kind=forward_kl", f"run_dir={other}").code == 0
    sets = (f"evaluation.sets.pets.path={data_file}", *SETS)
    done = abkd("eval", run.path, other, *sets, "--json")
    assert done.code == 0, done.err
    measured = json.loads(done.out)
    assert list(measured) == ["teacher", "before", str(run.path), str(other)]
    pets = measured["before"]["sets"]["pets"]
    assert pets["num_prompts"] == 3 and pets["num_seeds"] == 2 and [len(each) for each in pets["answers"]] == [3, 3]
    assert pets["answers"][0] != pets["answers"][1] and pets["interval"][0] <= pets["mean"] <= pets["interval"][1]
    assert measured["before"]["sets_mean"] == pets["mean"]
    kept = sorted(str(file.relative_to(other)) for file in other.glob("evaluation/*/*"))
    assert kept == ["evaluation/after/pets-0.json", "evaluation/after/pets-1.json"]

    table = abkd("eval", run.path, other, *sets)
    assert table.code == 0 and "Self-BLEU" in table.out and f"{pets['mean']:.1f} ({pets['sd']:.2f})" in table.out


def test_kept_answers_are_not_made_again_and_others_are(run, data_file, monkeypatch):
    sets = (f"evaluation.sets.pets.path={data_file}", *SETS)
    first = abkd("eval", run.path, *sets, "--json")
    assert first.code == 0, first.err
    with monkeypatch.context() as patched:
        patched.setattr("abkd.evaluation.sets.generate", lambda *arguments, **options: 1 / 0)
        assert abkd("eval", run.path, *sets, "--json").out == first.out
        with pytest.raises(ZeroDivisionError):
            abkd("eval", run.path, *sets, "evaluation.temperature=0.5")


def test_runs_of_two_data_sets_or_teachers_do_not_stand_beside_each_other(run, tmp_path, recipe_file, data_file):
    other = tmp_path / "other"
    assert abkd("train", recipe_file, *OVERRIDES, "data.num_held_out=3", f"run_dir={other}").code == 0
    assert refusal("eval", run.path, other) == (
        f"target: {str(other)!r} has data.num_held_out=3 and {str(run.path)!r} has 4; measure them apart, or set "
        "data.num_held_out for both"
    )


@pytest.mark.parametrize(
    "options, line",
    [
        (["evaluation.num_seeds=2"], "evaluation: num_seeds=2 repeats a greedy answer, for temperature=0; set"),
        (["evaluation.sets.a.path=none.jsonl"], "evaluation.sets.a.path: there is no file 'none.jsonl'; give a file"),
        (
            ["evaluation.sets.a={path: x, metric: bleu}"],
            "evaluation.sets.a.metric: 'bleu' is refused: input should be 'rouge_l'",
        ),
        (["evaluation.sets.a.max_rows=1"], "evaluation.sets.a.path: missing; add it to the recipe or the command line"),
        (["evaluation.sets={a/b: {path: x}}"], "evaluation: sets.a/b: a name is made of letters, digits, - and _"),
        (["evaluation.sets.a.file=x"], "evaluation.sets.a.path: missing; add it to the recipe or the command line"),
    ],
)
def test_a_mistaken_evaluation_set_is_one_line(run, options, line):
    done = abkd("eval", run.path, *options)
    assert done.code == 2 and done.err.startswith(f"abkd: {line}")


def test_eval_of_a_model_needs_a_recipe(teacher_folder):
    assert refusal("eval", teacher_folder) == (
        f"target: {str(teacher_folder)!r} is no run; for a model name teacher and data with --recipe RECIPE"
    )


# Checking and listing


def test_check_prints_the_resolved_recipe_and_what_it_names(recipe_file, teacher_folder, tmp_path):
    done = abkd("check", recipe_file, "training.seed=3")
    assert done.code == 0, done.err
    recipe = read_recipe(str(recipe_file), ["training.seed=3"])
    assert done.out.startswith(recipe.to_yaml())
    *lines, memory = done.out.removeprefix(recipe.to_yaml()).splitlines()
    assert lines == [
        f"teacher.path: {teacher_folder} ({teacher_folder})",
        "data: 8 rows to train on, 4 to validate with; all well-formed",
        "the recipe is valid; prompt lengths and vocabularies are checked when the tokenizer is loaded",
        "loading torch and transformers, for the memory that a step needs",
    ]
    assert memory.startswith("memory: a training step needs 0.0") and memory.endswith("GiB are free")
    assert not (tmp_path / "run").exists()


def test_every_mistake_of_a_recipe_is_a_line_of_its_own(recipe_file):
    done = abkd("check", recipe_file, "objective.divergence.alpha=.nan", "student.keep_layer=2")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "abkd: student.keep_layer: unknown key; did you mean 'keep_layers'? known here are freeze_embeddings, "
        "keep_layers, kind, layers, lora, path",
        "abkd: objective.divergence.alpha: nan is refused: input should be a finite number",
    ]


def test_recipes_are_listed_and_printed():
    listed, printed = abkd("recipes"), abkd("recipes", "demo")
    assert (listed.code, printed.code) == (0, 0)
    assert listed.out.splitlines()[0].split()[:2] == ["demo", "SmolLM2-135M-Instruct"]
    assert printed.out == (RECIPES / "demo.yaml").read_text(encoding="utf-8")
    assert refusal("recipes", "dmeo") == "recipes: there is none named 'dmeo'; see: abkd recipes"


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["check", "demo", "--fast"], ["recipes", "demo", "x=1"], ["eval", "x", "--recipe"]],
    ids=["no command", "an unknown command", "no recipe", "an unknown option", "too much", "an option without value"],
)
def test_a_malformed_command_line_ends_with_2_and_the_usage(arguments):
    done = abkd(*arguments)
    assert done.code == 2 and "usage: abkd" in done.err and done.out == ""


def test_help_names_every_command():
    done = abkd("--help")
    assert done.code == 0
    assert all(f"    {name} " in done.out for name in ("train", "check", "eval", "recipes", "demo"))


# No waiting for torch

WATCH = """
import sys
sys.path.insert(0, {here!r})
try:
    {statement}
except SystemExit as stop:
    print("exit code", stop.code)
print("imported:", sorted({{"torch", "transformers", "accelerate", "matplotlib"}} & sys.modules.keys()))
"""


def imported_by(statement: str) -> str:
    """The last line that a new Python prints after the statement: which of the slow packages it imported."""
    script = WATCH.format(here=str(Path(__file__).parent.parent), statement=statement)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    [
        "import abkd, abkd.config, abkd.cli, abkd.inputs",
        "from abkd.cli import main; sys.exit(main(['--help']))",
        "from abkd.cli import main; assert main(['check', RECIPE, 'data.train=/no/such']) == 2",
        "from abkd.cli import main; assert main(['train', RECIPE, 'training.num_steps=many']) == 2",
        "from abkd.cli import main; assert main(['train', RECIPE, 'teacher.path=/no/such']) == 2",
        "from abkd.cli import main; assert main(['eval', '/no/such']) == 2",
        "from abkd.cli import main; assert main(['recipes', 'demo']) == 0",
    ],
    ids=["import", "help", "a refused check", "a refused recipe", "a refused model", "a refused eval", "recipes"],
)
def test_torch_is_not_imported(statement, recipe_file):
    assert imported_by(statement.replace("RECIPE", repr(str(recipe_file)))) == "imported: []"


def test_an_import_of_torch_would_be_seen():
    assert imported_by("import abkd; abkd.ForwardKL") == "imported: ['torch']"
