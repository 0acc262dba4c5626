"""LoRA through the command line: checkpoints of the adapter, resume, merged and not; an adapter on a teacher."""

import importlib.util
import json
import shutil

import peft
import pytest
import torch
from conftest import make_gpt2, make_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abkd import InputError, cli, fit
from abkd.inputs import check_inputs
from abkd.models.adapters import add_lora, merge_adapter
from abkd.recipe import read_recipe
from abkd.rundir import RunDir

SFT = ["teacher=null", "objective.divergence=null", "objective.kd_weight=0", "objective.ce_weight=1"]
STEPS = ["training.num_steps=8", "training.learning_rate=0.02", "training.save_every=2"]
LORA = "student.lora={rank: 4, alpha: 8, dropout: 0.1, targets: [q_proj, down_proj]}"
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def prompt():
    return torch.tensor([[5, 9, 13, 20, 7]])


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def stop_after(monkeypatch, step):
    """The next training is interrupted after so many steps."""
    from abkd.callbacks import StopOnInterrupt

    on_step_end = StopOnInterrupt.on_step_end

    def interrupted(callback, args, state, control, **kwargs):
        callback.interrupted = state.global_step == step
        on_step_end(callback, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnInterrupt, "on_step_end", interrupted)


def test_a_run_with_lora_resumes_and_writes_a_merged_student(recipe_file, teacher_folder, tmp_path, monkeypatch):
    whole, stopped = RunDir(tmp_path / "whole"), RunDir(tmp_path / "stopped")
    options = ["student.kind=pretrained", f"student.path={teacher_folder}", LORA, *STEPS, "evaluation.num_generated=2"]
    assert cli.main(["train", str(recipe_file), *SFT, *options, f"run_dir={whole.path}"]) == 0
    checkpoint = whole.whole_checkpoints()[-1]
    assert not list(checkpoint.glob("model*.safetensors")) and (checkpoint / "adapter_model.safetensors").exists()
    config = json.loads((whole.student / "generation_config.json").read_text())
    assert config["eos_token_id"] == 0  # the base model's own, after answering

    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        assert cli.main(["train", str(recipe_file), *SFT, *options, f"run_dir={stopped.path}"]) == 130
    assert cli.main(["train", str(stopped.path / "recipe.yaml"), "resume=true"]) == 0
    base, expected, found = (
        load_file(folder / "model.safetensors") for folder in (teacher_folder, whole.student, stopped.student)
    )
    assert base.keys() == expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], found[name])}
    assert moved == {"q_proj", "down_proj"}
    results = whole.read_results()
    assert results["after"]["next_token_loss"] < results["before"]["next_token_loss"]

    shutil.rmtree(stopped.student)  # stopped after its last step, before it wrote its student
    (stopped.path / "results.json").unlink()
    assert cli.main(["train", str(stopped.path / "recipe.yaml"), "resume=true"]) == 0
    found = load_file(stopped.student / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    (stopped.path / "results.json").unlink()  # stopped while it measured
    assert cli.main(["train", str(stopped.path / "recipe.yaml"), "resume=true"]) == 0
    assert stopped.read_results()["after"]["next_token_loss"] == pytest.approx(results["after"]["next_token_loss"])


def test_an_adapter_alone_is_a_student_and_goes_onto_a_teacher(recipe_file, teacher_folder, tmp_path, prompt, capsys):
    run_dir = RunDir(tmp_path / "sft")
    options = ["student.kind=pretrained", f"student.path={teacher_folder}", LORA, "student.lora.merge=false"]
    assert cli.main(["train", str(recipe_file), *SFT, *options, *STEPS, f"run_dir={run_dir.path}"]) == 0
    assert not list(run_dir.student.glob("model*.safetensors"))
    assert "library_name: peft" in (run_dir.student / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(teacher_folder)
    expected = logits(peft.PeftModel.from_pretrained(base, run_dir.student), prompt)
    base = AutoModelForCausalLM.from_pretrained(teacher_folder)
    assert (logits(base, prompt) - expected).norm() > 1e-2 * expected.norm()
    merged = merge_adapter(base, str(run_dir.student), "teacher.adapter")
    torch.testing.assert_close(logits(merged, prompt), expected, rtol=1e-4, atol=1e-5)

    capsys.readouterr()
    assert cli.main(["eval", str(run_dir.path), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["student"]
    assert measured["next_token_loss"] == pytest.approx(run_dir.read_results()["after"]["next_token_loss"], rel=1e-4)

    adapter = [f"teacher.adapter={run_dir.student}", f"run_dir={tmp_path / 'kd'}"]
    assert cli.main(["train", str(recipe_file), *adapter]) == 0
    teacher = RunDir(tmp_path / "kd").read_results()["teacher"]
    assert teacher["next_token_loss"] == pytest.approx(measured["next_token_loss"], rel=1e-4)


def test_lora_on_a_shrunken_student_and_on_gpt2(recipe_file, tmp_path, tokenizer, prompt):
    assert cli.main(["train", str(recipe_file), "student.lora.rank=2", "training.activation_checkpointing=true"]) == 0
    results = RunDir(tmp_path / "run").read_results()
    assert results["after"]["forward_kl"] < results["before"]["forward_kl"]
    student = make_gpt2(len(tokenizer), layers=1)
    expected = logits(student, prompt)
    adapted = add_lora(student, rank=2, alpha=4.0, dropout=0.0, targets="all-linear")
    torch.testing.assert_close(logits(adapted, prompt), expected)
    names = {name.split(".lora_")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(
    "options, reason",
    [
        (["teacher.quantization=nf4", "student.kind=pretrained", "student.path=/s"], "the teacher is quantised"),
        (["student.lora.rank=2"], "student.lora trains an adapter"),
        (["training.engine=fsdp2"], "training.engine=fsdp2 shards it"),
    ],
)
def test_what_is_not_known_of_the_memory_is_said(recipe_file, options, reason):
    lines = []
    fit.say_memory(read_recipe(str(recipe_file), options), lines.append)
    assert lines == [f"memory: what a training step needs is not known, because {reason}"]


REFUSED = {
    "student.lora.merge=false": "lora.merge=false would write an adapter for a student that is nowhere saved",
    "student.lora.rank=0": "student.lora.rank: 0 is refused: input should be greater than or equal to 1",
    "student.lora.targets=[]": "student.lora.targets",
    "teacher.quantization=nf4": "student.kind=shrink takes layers out of the teacher, whose weights are in nf4",
}


@pytest.mark.parametrize("override", REFUSED)
def test_an_option_that_cannot_work_is_refused(recipe_file, override):
    with pytest.raises(InputError) as refused:
        read_recipe(str(recipe_file), [override])
    assert REFUSED[override] in str(refused.value)


def test_an_adapter_into_quantised_weights_is_refused(recipe_file):
    options = ["teacher.quantization=int8", "teacher.adapter=/a", "student.kind=pretrained", "student.path=/s"]
    with pytest.raises(InputError, match="teacher: adapter='/a' cannot be merged into weights of quantization=int8"):
        read_recipe(str(recipe_file), options)


def test_layers_of_no_model_are_refused_in_one_line(recipe_file, capsys):
    assert cli.main(["train", str(recipe_file), "student.lora.targets=[nowhere]"]) == 2
    error = capsys.readouterr().err
    assert "student.lora.targets: ['nowhere'] is refused" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "package, options, field",
    [
        ("peft", ["student.lora.rank=2"], "student.lora"),
        ("peft", ["teacher.adapter=/a"], "teacher.adapter"),
        ("bitsandbytes", ["teacher.quantization=nf4", "student.kind=pretrained", "student.path=/s"],
         "teacher.quantization"),
        ("deepspeed", ["training.engine=zero2"], "training.engine"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named(recipe_file, monkeypatch, package, options, field):
    find = importlib.util.find_spec
    monkeypatch.setattr("abkd.inputs.find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=rf"{field}: needs the package {package}; install it with pip install 'abkd\["):
        check_inputs(read_recipe(str(recipe_file), options))


def test_a_folder_that_is_no_adapter_for_this_model_is_refused(recipe_file, tmp_path, tokenizer, teacher_folder):
    for path, line in (("/nowhere", "holds no adapter_config.json"), (str(teacher_folder), "holds no adapter_config")):
        with pytest.raises(InputError, match=f"teacher.adapter: '{path}' {line}"):
            check_inputs(read_recipe(str(recipe_file), [f"teacher.adapter={path}"]))
    wide = add_lora(make_llama(len(tokenizer)), rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",))
    wide.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="was made for a model of other layers, 4 do not fit"):
        merge_adapter(make_llama(len(tokenizer), layers=2), str(tmp_path / "adapter"), "teacher.adapter")
    with pytest.raises(InputError, match=r"teacher\.adapter: peft cannot put"):
        merge_adapter(make_gpt2(len(tokenizer)), str(tmp_path / "adapter"), "teacher.adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="is torn"):
        check_inputs(read_recipe(str(recipe_file), [f"teacher.adapter={tmp_path / 'adapter'}"]))
