"""vLLM in the place of `generate_ids`: with a stand-in that keeps its interface here, with vLLM itself where it is."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from abkd import cli
from abkd.generation import Sampling, generate_ids
from abkd.models.adapters import add_lora, merged_weights

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
PROMPTS = [[5, 6, 7], [9, 10, 11, 12], [20]]


def make(seed=0):
    """With heads that vLLM's CPU attention has a kernel for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class StandIn:
    """Reads the folder it is given, and answers through transformers with the weights that it is sent."""

    def __init__(self, model, **options):
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.options, self.num_sent = options, 0

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.model.load_state_dict(dict(kwargs["weights_iterator"]))
        self.num_sent += 1

    def generate(self, prompts, how, use_tqdm):
        made = []
        for prompt, each in zip(prompts, how, strict=True):
            assert each.ignore_eos and not each.detokenize
            sampling = Sampling(each.max_tokens, each.temperature, each.top_p)
            (end_id,) = each.stop_token_ids
            ids = [prompt["prompt_token_ids"]]
            made += generate_ids(self.model, ids, sampling, end_id=end_id, seed=each.seed)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in made]


@pytest.fixture(params=["a stand-in", "vllm"])
def vllm(request, monkeypatch):
    """The class VLLM over one of them."""
    if request.param == "a stand-in":
        module = ModuleType("vllm")
        module.LLM, module.SamplingParams = StandIn, SimpleNamespace
        monkeypatch.setitem(sys.modules, "vllm", module)
    elif importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    from abkd.generation_vllm import VLLM

    return VLLM


def test_what_is_sent_is_what_answers(vllm):
    sample = vllm(make(), max_tokens=32, memory=0.2, dtype="float32", weights=merged_weights)
    adapted = add_lora(make(seed=6), rank=4, alpha=8, dropout=0.0, targets="all-linear")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    answers = []
    for model in (make(), make(seed=5), adapted):
        done = []
        answers.append(sample(model, PROMPTS, GREEDY, end_id=0, progress=done.append))
        assert answers[-1] == generate_ids(model, PROMPTS, GREEDY, end_id=0) and done == [3]
    assert answers[0] != answers[1] != answers[2]
    whole = answers[2][0]
    assert sample(adapted, PROMPTS[:1], GREEDY, end_id=whole[4]) == [whole[: whole.index(whole[4]) + 1]]

    warm = Sampling(max_new_tokens=8, temperature=1.0)
    one, again, other = (sample(adapted, PROMPTS, warm, end_id=0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    same = sample(adapted, [[5, 6, 7]] * 3, warm, end_id=0, seed=3)
    assert not same[0] == same[1] == same[2]


def test_weights_that_stay_are_sent_once(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    from abkd.generation_vllm import VLLM

    model = make()
    sample = VLLM(model, max_tokens=32, is_fixed=True)
    assert sample(model, PROMPTS, GREEDY, end_id=0) == sample(model, PROMPTS, GREEDY, end_id=0)
    assert sample._llm.num_sent == 1 and sample._llm.options["max_model_len"] == 32


def test_merged_weights_are_those_of_the_merged_model():
    adapted = add_lora(make(), rank=4, alpha=8, dropout=0.0, targets="all-linear")
    for parameter in adapted.parameters():
        parameter.data.normal_(std=0.1)
    found = {name: weight.clone() for name, weight in merged_weights(adapted)}
    expected = adapted.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
@pytest.mark.parametrize(
    "command, field",
    [
        (["train", "rollouts.kind=on_policy", "rollouts.engine=vllm"], "rollouts.engine"),
        (["generate", "--output", "answers.jsonl", "--engine", "vllm"], "--engine"),
    ],
)
def test_without_vllm_it_is_refused_in_a_line(recipe_file, capsys, command, field):
    name, *options = command
    assert cli.main([name, str(recipe_file), *options]) == cli.USERS_MISTAKE
    expected = f"abkd: {field}: needs the package vllm; install it with pip install 'abkd[vllm]'\n"
    assert capsys.readouterr().err.endswith(expected)


def test_vllm_and_shards_do_not_go_together(recipe_file, capsys):
    options = ["rollouts.kind=on_policy", "rollouts.engine=vllm", "training.engine=fsdp2"]
    assert cli.main(["check", str(recipe_file), *options]) == cli.USERS_MISTAKE
    assert "rollouts.engine=vllm" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_a_run_with_vllm_and_the_teachers_answers(tmp_path, tokenizer, data_file):
    from conftest import write_recipe

    folder = tmp_path / "teacher"
    make().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = write_recipe(tmp_path, folder, data_file)
    options = ["student.keep_layers=1", "rollouts.kind=on_policy", "rollouts.engine=vllm", "rollouts.max_new_tokens=8"]
    assert cli.main(["train", str(file), *options]) == cli.DONE
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"num_sampled": 2' in line for line in lines) == 4
    output = tmp_path / "answers.jsonl"
    assert cli.main(["generate", str(file), "--output", str(output), "--engine", "vllm"]) == cli.DONE
