"""Training from a cache: the same curve as with the teacher at hand; and caches of anything else are refused."""

import gc
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import make_llama, make_tokenizer, write_recipe
from safetensors.torch import load_file
from test_caching import one_line

from abkd import cli, run, setup
from abkd.rundir import RunDir
from abkd.teachers.cache.manifest import shard_file

ALL = ["--targets=top_k", "--k=1000", "--value-bits=16"]


class World(NamedTuple):
    recipe: Path
    folder: Path
    teacher: Path
    data: Path

    def cache(self, name, *options):
        """The folder of a cache that is written once."""
        folder = self.folder / name
        if not folder.exists():
            given = ["--output", str(folder), "--shard-tokens=40", *options]
            assert cli.main(["cache", str(self.recipe), *given]) == cli.DONE
        return folder

    def train(self, run_dir, teacher, *overrides):
        """The exit code; `teacher` is a section in YAML, None the recipe's own."""
        section = [] if teacher is None else [f"teacher={teacher}"]
        return cli.main(["train", str(self.recipe), *section, *overrides, f"run_dir={run_dir}"])


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer, teacher_folder, data_file):
    folder = tmp_path_factory.mktemp("world")
    recipe = write_recipe(folder, teacher_folder, data_file)
    make_llama(len(tokenizer), layers=1, seed=3).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    text = recipe.read_text().replace("{kind: shrink, keep_layers: 2}", f"{{kind: pretrained, path: {folder}/student}}")
    recipe.write_text(text)
    return World(recipe, folder, teacher_folder, data_file)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Without reports and memory estimates, which take longer than these runs, as the Trainer's gc.collect does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "report_after", lambda *_: None)
        patch.setattr(setup, "say_memory", lambda *_: None)
        gc.freeze()
        yield
        gc.unfreeze()


def cached(folder, tail=None):
    return f"{{kind: cached, path: {folder}{f', tail: {tail}' if tail else ''}}}"


def curve(run_dir):
    return torch.tensor([line["loss"] for line in RunDir(run_dir).read_metrics() if "loss" in line])


def student(run_dir):
    return load_file(run_dir / "student" / "model.safetensors")


SETTINGS = {
    "fused": ["objective.ce_weight=0.3"],
    "dense": ["training.logits=dense", "objective.ce_weight=0.3"],
    "packed, accumulated, grouped": ["training.pack=true", "training.accumulation=2", "training.group_by_length=true"],
    "at temperature 2": ["objective.temperature=2"],
    "of another temperature": ["objective.temperature=1.5", "objective.teacher_temperature=2", "training.logits=dense"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_curve_is_that_of_the_teacher_at_hand(world, setting, tmp_path):
    """9 steps of 2 of 8 examples: three epochs, each in another order."""
    overrides = ["training.num_steps=9", *SETTINGS[setting]]
    assert world.train(tmp_path / "truth", None, *overrides) == cli.DONE
    truth = curve(tmp_path / "truth")
    assert len(truth) == 9 and truth.std() > 0.01
    temperature = 2 if "temperature" in setting else 1
    teachers = {
        "hidden": (cached(world.cache("hidden", "--targets=hidden")), 2e-6),
        "logits": (cached(world.cache("logits", "--targets=logits")), 2e-6),
        "all": (cached(world.cache(f"all-{temperature}", *ALL, f"--temperature={temperature}"), "uniform"), 1e-3),
    }
    for name, (teacher, error) in teachers.items():
        assert world.train(tmp_path / name, teacher, *overrides) == cli.DONE
        torch.testing.assert_close(curve(tmp_path / name), truth, rtol=error, atol=0)
    expected, found = student(tmp_path / "truth"), student(tmp_path / "hidden")
    assert all(torch.allclose(found[name], tensor, atol=2e-5) for name, tensor in expected.items())
    results = [RunDir(tmp_path / name).read_results() for name in ("truth", "hidden")]
    for name in ("forward_kl", "token_agreement", "next_token_loss"):
        assert results[0]["after"][name] == pytest.approx(results[1]["after"][name], rel=1e-4)
    assert "teacher" in results[0] and "teacher" not in results[1]


@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalise", None])
@pytest.mark.parametrize("logits", ["fused", "dense"])
def test_top_k_targets_and_samples_train(world, tail, logits, tmp_path):
    given = ["--k=20"] if tail else ["--k=20", "--targets=sampled"]
    folder = world.cache("top_k" if tail else "sampled", *given)
    overrides = [f"training.logits={logits}", "training.num_steps=12", "training.learning_rate=1e-2"]
    assert world.train(tmp_path / "run", cached(folder, tail), *overrides) == cli.DONE
    losses = curve(tmp_path / "run")
    assert losses.isfinite().all() and losses[-4:].mean() < losses[:4].mean()


def test_a_resumed_run_comes_to_the_same_student(world, tmp_path):
    teacher = cached(world.cache("hidden", "--targets=hidden"))
    folder = RunDir(tmp_path / "run")
    assert world.train(folder.path, teacher, "training.num_steps=6", "training.save_every=3") == cli.DONE
    expected, losses = student(folder.path), curve(folder.path)
    for path in (folder.student, folder.checkpoint(6)):
        shutil.rmtree(path)
    (folder.path / "results.json").unlink()
    assert cli.main(["train", str(folder.path / "recipe.yaml"), "resume=true"]) == cli.DONE
    assert all(torch.equal(expected[name], tensor) for name, tensor in student(folder.path).items())
    assert curve(folder.path).equal(losses)


@pytest.mark.parametrize("student_width, teacher_width", [(6, 0), (0, 6)])
def test_a_padded_vocabulary_of_either(world, tokenizer, student_width, teacher_width, tmp_path):
    for name, width, layers in (("student", student_width, 1), ("teacher", teacher_width, 2)):
        make_llama(len(tokenizer) + width, layers=layers, seed=5).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = [f"student.path={tmp_path / 'student'}", "training.num_steps=5"]
    own = [f"teacher.path={tmp_path / 'teacher'}"]
    assert world.train(tmp_path / "truth", None, *models, *own) == cli.DONE
    for name, tail, error, options in (
        ("hidden", None, 2e-6, ["--targets=hidden"]),
        ("logits", None, 2e-6, ["--targets=logits"]),
        ("all", "uniform", 1e-3, ALL),
    ):
        folder = tmp_path / f"cache-{name}"
        given = ["--output", str(folder), *options, *own]
        assert cli.main(["cache", str(world.recipe), *given]) == cli.DONE
        assert world.train(tmp_path / name, cached(folder, tail), *models) == cli.DONE
        torch.testing.assert_close(curve(tmp_path / name), curve(tmp_path / "truth"), rtol=error, atol=0)


def test_a_student_is_shrunk_out_of_a_model_beside_the_cache(world, tmp_path):
    teacher = cached(world.cache("hidden", "--targets=hidden"))
    shrink = "student={kind: shrink, keep_layers: 2%s}"
    assert world.train(tmp_path / "truth", None, shrink % "") == cli.DONE
    assert world.train(tmp_path / "run", teacher, shrink % f", path: {world.teacher}") == cli.DONE
    torch.testing.assert_close(curve(tmp_path / "run"), curve(tmp_path / "truth"), rtol=2e-6, atol=0)


@pytest.fixture
def second_teacher(world, tokenizer, tmp_path):
    make_llama(len(tokenizer), layers=2, seed=9).save_pretrained(tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    return tmp_path / "second"


def mixture(*teachers, weights=""):
    return f"{{kind: mixture, teachers: [{', '.join(teachers)}]{weights}}}"


@pytest.mark.parametrize("logits", ["fused", "dense"])
def test_a_mixture_is_the_same_of_models_and_of_caches(world, second_teacher, logits, tmp_path):
    weights, overrides = ", weights: [3, 1]", [f"training.logits={logits}", "objective.temperature=1.5"]
    first, second = f"{{path: {world.teacher}}}", f"{{path: {second_teacher}}}"
    assert world.train(tmp_path / "truth", mixture(first, second, weights=weights), *overrides) == cli.DONE
    alone = world.train(tmp_path / "alone", None, *overrides)
    assert alone == cli.DONE and (curve(tmp_path / "alone") - curve(tmp_path / "truth")).abs().max() > 0.01
    hidden = cached(world.cache("hidden", "--targets=hidden"))
    everything = cached(world.cache("all-1", *ALL, "--temperature=1"), "uniform")
    for name, one, error in (("hidden", hidden, 2e-6), ("all", everything, 1e-3)):
        assert world.train(tmp_path / name, mixture(one, second, weights=weights), *overrides) == cli.DONE
        torch.testing.assert_close(curve(tmp_path / name), curve(tmp_path / "truth"), rtol=error, atol=0)
    both = ["--targets=logits", f"teacher={mixture(first, second, weights=weights)}"]
    folder = tmp_path / "mixed"
    assert cli.main(["cache", str(world.recipe), "--output", str(folder), *both]) == cli.DONE
    assert world.train(tmp_path / "mixed-run", cached(folder), *overrides) == cli.DONE
    torch.testing.assert_close(curve(tmp_path / "mixed-run"), curve(tmp_path / "truth"), rtol=2e-6, atol=0)


def test_mixtures_that_cannot_be_are_refused(world, tokenizer, tmp_path, capsys):
    other = make_tokenizer(corpus=["quite other words here and there"])
    make_llama(len(other), layers=1).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    own, top_k = f"{{path: {world.teacher}}}", world.cache("top_k", "--k=20")
    sampled = world.cache("sampled", "--k=20", "--targets=sampled")
    hot = world.cache("hot", "--k=20", "--temperature=2")
    capsys.readouterr()
    for teacher, *said in (
        (
            mixture(own, f"{{path: {tmp_path / 'other'}}}"),
            "teacher.teachers.1 and teacher.teachers.0 have different tok",
        ),
        (mixture(own, cached(top_k, "lump")), "tail=lump has no row to mix; set tail=uniform"),
        (mixture(own), "teachers has 1 of them, and a mixture needs 2 or more"),
        (mixture(own, own, weights=", weights: [1]"), "weights has 1 numbers for 2 teachers"),
        (mixture(own, own, weights=", weights: [1, 0]"), "weights"),
        (mixture(own, cached(top_k)), "teacher.teachers.1.tail: missing"),
        (mixture(own, cached(sampled)), "teacher.teachers.1.path=", "a mixture takes rows at temperature 1"),
        (mixture(own, cached(hot, "uniform")), "teacher.teachers.1.path=", "at temperature 2, and a mixture takes"),
    ):
        assert world.train(tmp_path / "run", teacher) == cli.USERS_MISTAKE
        one_line(capsys, *said)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.prompt_format=plain"], ["made with data.prompt_format='chat', and here is data.prompt_format='plain'"]),
        (["data.max_tokens=68"], ["lacks", "made with data.max_tokens=128, and here is data.max_tokens=68"]),
        (
            ["objective.temperature=2"],
            ["at temperature 1, and here is objective.temperature=2; set objective.t"],
        ),
        (["objective.teacher_temperature=3"], ["at temperature 1, and here is objective.teacher_temperature=3"]),
        (["teacher.tail=null"], ["teacher.tail: missing, and the cache holds top-k targets"]),
        (
            ["objective.divergence=null", "objective.calibration={kind: dkd}"],
            ["objective.calibration.kind=dkd"],
        ),
        (["rollouts={kind: on_policy}"], ["teacher.kind=cached knows what the teacher says of the data"]),
        (["student={kind: shrink, keep_layers: 2}"], ["student.kind=shrink needs a teacher to shrink"]),
        (["teacher.path=nowhere"], ["teacher.path: "]),
    ],
)
def test_another_run_is_refused_before_it_starts(world, overrides, said, tmp_path, capsys):
    teacher = cached(world.cache("top_k", "--k=20"), "uniform")
    capsys.readouterr()
    data = tmp_path / "long.jsonl"
    data.write_text(world.data.read_text().replace(" likes milk.", " likes milk." * 30))
    long = [f"data.train={data}"] if "max_tokens" in overrides[0] else []
    if long:
        folder = tmp_path / "long"
        given = ["--output", str(folder), "--k=20", *long]
        assert cli.main(["cache", str(world.recipe), *given]) == cli.DONE
        teacher = cached(folder, "uniform")
    assert world.train(tmp_path / "run", teacher, *long, *overrides) == cli.USERS_MISTAKE
    one_line(capsys, *said)
    assert not (tmp_path / "run").exists()


def test_other_data_is_refused_and_the_same_at_another_place_or_a_part_of_it_is_not(world, tmp_path, capsys):
    teacher = cached(world.cache("top_k", "--k=20"), "uniform")
    rows = world.data.read_text().splitlines(keepends=True)
    copy, more = tmp_path / "copy.jsonl", tmp_path / "more.jsonl"
    copy.write_text("".join(rows[::-1]))
    more.write_text("".join([*rows, json.dumps({"prompt": "And the owl?", "completion": "The owl likes sun."}) + "\n"]))
    capsys.readouterr()
    assert world.train(tmp_path / "refused", teacher, f"data.train={more}") == cli.USERS_MISTAKE
    one_line(capsys, "lacks 1 of 13 examples", f"with data.train='{world.data}', and here is data.train='{more}'")
    assert world.train(tmp_path / "copy", teacher, f"data.train={copy}") == cli.DONE
    assert world.train(tmp_path / "part", teacher, "data.max_train_rows=3", "data.num_held_out=2") == cli.DONE


def test_data_that_was_edited_in_place_is_refused(world, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    shutil.copy(world.data, data)
    given = ["--output", str(tmp_path / "cache"), "--targets=hidden", f"data.train={data}"]
    assert cli.main(["cache", str(world.recipe), *given]) == cli.DONE
    data.write_text(data.read_text().replace("hen", "owl"))
    capsys.readouterr()
    code = world.train(tmp_path / "run", cached(tmp_path / "cache"), f"data.train={data}")
    assert code == cli.USERS_MISTAKE
    one_line(
        capsys, "teacher.path: the cache in", "lacks 3 of 12 examples: they are other texts than those it was made of"
    )


def test_a_student_of_another_tokenizer_is_refused(world, tmp_path, capsys):
    other = make_tokenizer(corpus=["quite other words here and there"])
    make_llama(len(other), layers=1).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    teacher = cached(world.cache("hidden", "--targets=hidden"))
    capsys.readouterr()
    assert world.train(tmp_path / "run", teacher, f"student.path={tmp_path / 'other'}") == cli.USERS_MISTAKE
    one_line(capsys, "student and teacher have different tokenizers", "to the student", "to the teacher")


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda folder: shard_file(folder, 1).unlink(), "1 of 4 shards are missing, the first is shard-00001"),
        (lambda folder: shutil.copy(shard_file(folder, 2), shard_file(folder, 1)), "shard-00001.safetensors"),
        (lambda folder: shard_file(folder, 1).write_bytes(shard_file(folder, 1).read_bytes()[:-9]), "is torn"),
        (lambda folder: (folder / "head.safetensors").unlink(), "head.safetensors is torn"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "the tokenizer in"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is of format None"),
        (lambda folder: _edit(folder / "manifest.json", '"language_model"', '"image_classification"'), "was altered"),
        (lambda folder: _edit(folder / "tokenizer" / "tokenizer.json", '"Ġlikes"', '"Ġloves"'), "the tokenizer in"),
    ],
)  # fmt: skip
def test_a_cache_that_is_not_whole_is_refused_by_name(world, harm, said, tmp_path, capsys):
    folder = tmp_path / "harmed"
    shutil.copytree(world.cache("hidden", "--targets=hidden"), folder)
    harm(folder)
    capsys.readouterr()
    assert world.train(tmp_path / "run", cached(folder)) == cli.USERS_MISTAKE
    one_line(capsys, said, str(folder))
    assert not (tmp_path / "run").exists()


def _edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_a_divergence_that_is_no_sum_is_refused_for_a_sample_before_it_starts(world, tmp_path, capsys):
    teacher = cached(world.cache("sampled", "--k=20", "--targets=sampled"))
    capsys.readouterr()
    assert world.train(tmp_path / "run", teacher, "objective.divergence={kind: akl}") == cli.USERS_MISTAKE
    one_line(capsys, "objective.divergence.kind=akl is no sum over classes, which a sample")
    assert not (tmp_path / "run").exists()
    ramp = "objective.divergence={kind: alpha_beta, alpha: {from: 0.8, to: 0.2}}"
    assert world.train(tmp_path / "run", teacher, ramp) == cli.DONE


def test_data_of_a_shard_that_was_altered_stops_the_run_by_name(world, tmp_path, capsys):
    folder = tmp_path / "altered"
    shutil.copytree(world.cache("logits", "--targets=logits"), folder)
    file = shard_file(folder, 2)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    capsys.readouterr()
    assert world.train(tmp_path / "run", cached(folder), "training.num_steps=8") == cli.USERS_MISTAKE
    one_line(capsys, f"{file} was altered")
