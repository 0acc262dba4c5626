"""Seeds, and tiny models and data made in memory: no test but those marked `wheel` needs a real model."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side wait for each other's threads

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_THREADS = torch.get_num_threads()
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

CORPUS = [
    f"The {animal} likes {thing}." for animal in ("cat", "dog", "hen", "fox") for thing in ("milk", "rain", "sun")
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(vocab_size: int = 300, corpus=CORPUS) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def make_llama(vocab_size: int, layers: int = 4, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def make_gpt2(vocab_size: int, layers: int = 4, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=256, n_embd=32, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(autouse=True)
def _seed_and_threads(request):
    """One thread but for the real model: on a busy machine, threads over tiny tensors only wait for each other."""
    torch.manual_seed(0)
    torch.set_num_threads(NUM_THREADS if request.node.get_closest_marker("wheel") else 1)


@pytest.fixture(autouse=True)
def _nan_filled_empty(request):
    """What `torch.empty` gives is NaN in the kernels' tests: memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(request.node.path.parent.name == "kernels")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("teacher")
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": f"What does the {animal} like?", "completion": f"The {animal} likes {thing}{' and more' * extra}."}
        for animal in ("cat", "dog", "hen", "fox")
        for extra, thing in enumerate(("milk", "rain", "sun"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_recipe(folder, teacher_folder, data_file):
    """A small valid recipe in `folder`: 4-layer teacher, 2-layer student, 4 steps, run_dir folder/run."""
    file = folder / "recipe.yaml"
    file.write_text(
        f"""# a tiny recipe for tests
task: language_model
teacher: {{path: "{teacher_folder}"}}
student: {{kind: shrink, keep_layers: 2}}
data: {{train: "{data_file}", num_held_out: 4, max_prompt_tokens: 64, max_tokens: 128}}
objective:
  divergence: {{kind: alpha_beta, alpha: 0.2, beta: 0.7}}
training: {{num_steps: 4, batch_size: 2, learning_rate: 1.0e-3}}
evaluation: {{batch_size: 4}}
run_dir: "{folder / "run"}"
""",
        encoding="utf-8",
    )
    return file


@pytest.fixture
def recipe_file(tmp_path, teacher_folder, data_file):
    return write_recipe(tmp_path, teacher_folder, data_file)
