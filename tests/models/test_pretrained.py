"""Models are found whole or refused in one line, from the folder's headers alone; then loaded whole or refused."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from conftest import make_gpt2, make_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abkd.errors import InputError
from abkd.head import LMHead
from abkd.models.pretrained import find_model, load_model, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORN = "{folder}/model.safetensors is torn or not a safetensors file; copy it again"


@pytest.fixture
def folder(tmp_path, teacher_folder):
    """A copy of the teacher that a test may damage."""
    return shutil.copytree(teacher_folder, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path, tokenizer):
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def refusal(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def safetensors(header: object, data: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


# Finding


def test_a_whole_folder_is_found(folder):
    assert find_model(str(folder), "teacher.path") == folder


def test_the_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/model", "teacher.path") == folder


@pytest.mark.parametrize("path", ["owner/name", "gpt2"])
def test_what_is_no_folder_may_be_a_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(path, "teacher.path") is None


@pytest.mark.parametrize("path", ["/no/such", "./model", "~/no-such-model", "a/b/c", "no.gguf", "package:abkd/none"])
def test_a_path_that_cannot_be_a_hub_id_must_be_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = f"student.path: there is no folder {path!r}; give a model folder or a hub id owner/name"
    assert refusal(find_model, path, "student.path") == expected


DAMAGES = {
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "{folder!r} is not a model folder (no config.json); give the folder that save_pretrained wrote",
    ),
    "torn config.json": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8"),
        "{folder}/config.json is not valid JSON; copy the folder again",
    ),
    "config.json not UTF-8": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        "{folder}/config.json is not valid JSON; copy the folder again",
    ),
    "no model_type": (
        lambda folder: (folder / "config.json").write_text('{"hidden_size": 32}', encoding="utf-8"),
        "{folder}/config.json names no model_type; give a causal language model's folder",
    ),
    "config.json a list": (
        lambda folder: (folder / "config.json").write_text("[]", encoding="utf-8"),
        "{folder}/config.json names no model_type; give a causal language model's folder",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "{folder!r} holds no weights (*.safetensors); copy the folder again",
    ),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), TORN),
    "a torn header": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]), TORN),
    "an LFS pointer": (
        lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8"),
        TORN,
    ),
    "no tensors": (lambda folder: (folder / WEIGHTS).write_bytes(safetensors({"__metadata__": {}})), TORN),
    "a header of another shape": (lambda folder: (folder / WEIGHTS).write_bytes(safetensors(["a"], b"xx")), TORN),
    "offsets of another shape": (
        lambda folder: (folder / WEIGHTS).write_bytes(safetensors({"a": {"data_offsets": [0]}}, b"xx")),
        TORN,
    ),
    "a torn index": (
        lambda folder: (folder / INDEX).write_text("{", encoding="utf-8"),
        "{folder}/model.safetensors.index.json is torn or no index of weights; copy it again",
    ),
    "an index of another shape": (
        lambda folder: (folder / INDEX).write_text('{"weights": []}', encoding="utf-8"),
        "{folder}/model.safetensors.index.json is torn or no index of weights; copy it again",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_refused(folder, kind):
    damage, reason = DAMAGES[kind]
    damage(folder)
    expected = "teacher.path: " + reason.replace("{folder!r}", repr(str(folder))).replace("{folder}", str(folder))
    assert refusal(find_model, str(folder), "teacher.path") == expected


@pytest.mark.parametrize("change", [-1, -5000, 1], ids=["a byte short", "kilobytes short", "a byte long"])
def test_weights_of_another_length_than_their_header_says_are_refused(folder, change):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:change] if change < 0 else whole + b"x")
    assert refusal(find_model, str(folder), "teacher.path") == (
        f"teacher.path: {folder / WEIGHTS} is torn: {len(whole) + change:,} bytes of {len(whole):,}; copy it again"
    )


def test_a_missing_shard_is_named(sharded):
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(shards) > 2 and find_model(str(sharded), "teacher.path") == sharded
    (sharded / shards[1]).unlink()
    assert refusal(find_model, str(sharded), "teacher.path") == (
        f"teacher.path: {str(sharded)!r} misses {shards[1]} (1 of {len(shards)} weight files); copy the folder again"
    )


def test_a_torn_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(find_model, str(sharded), "teacher.path").startswith(f"teacher.path: {shard} is torn: ")


# Loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_loads_as_the_plain_model_in_evaluation_mode(folder, dtype):
    model = load_model(str(folder), "teacher.path", dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert model.dtype == getattr(torch, dtype) and not model.training
    for (name, loaded), (_, expected) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(loaded, expected), name


def test_a_tied_head_is_no_missing_weight(folder):
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    model = load_model(str(folder), "teacher.path")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_and_old_bin_files_load(sharded, tmp_path):
    model = load_model(str(sharded), "student.path")
    old = shutil.copytree(sharded, tmp_path / "old", ignore=shutil.ignore_patterns("*safetensors*"))
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    again = load_model(str(old), "student.path")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_weight_that_is_not_in_the_files_is_refused_not_drawn_at_random(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert refusal(load_model, str(folder), "teacher.path") == (
        f"teacher.path: {str(folder)!r} lacks 2 of the weights that its configuration asks for, or has them in another "
        "size, first model.layers.2.mlp.up_proj.weight; give a whole causal language model"
    )


def test_a_body_without_its_head_is_refused(tmp_path):
    make_llama(300, tied=False).model.save_pretrained(tmp_path)
    assert "first lm_head.weight; give a whole causal" in refusal(load_model, str(tmp_path), "teacher.path")


def test_weights_of_another_size_than_the_configuration_are_refused(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}), encoding="utf-8")
    message = refusal(load_model, str(folder), "student.path")
    assert message.startswith(f"student.path: {str(folder)!r} lacks 12 of the weights")


def test_a_model_of_another_kind_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    message = refusal(load_model, str(folder), "teacher.path")
    assert message.startswith(f"teacher.path: AutoModelForCausalLM cannot load {str(folder)!r}: Unrecognized config")
    assert message.endswith("; give one that is whole, with its tokenizer")


def test_a_torn_bin_file_is_refused(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"torn")
    message = refusal(load_model, str(folder), "teacher.path")
    assert message.startswith(f"teacher.path: AutoModelForCausalLM cannot load {str(folder)!r}: ")


def test_a_hub_that_cannot_be_reached_is_a_users_mistake():
    for load in (load_model, load_tokenizer):
        message = refusal(load, "owner/no-such-name", "teacher.path")
        assert message.startswith("teacher.path: Auto") and "cannot load 'owner/no-such-name'" in message
        assert message.endswith("; check the name and the connection")


def test_a_tokenizer_loads_beside_its_model(folder, tokenizer):
    loaded = load_tokenizer(str(folder), "teacher.path")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)


@pytest.mark.parametrize("damage", ["no tokenizer", "torn tokenizer"])
def test_a_tokenizer_that_is_not_there_is_refused(folder, damage):
    (folder / "tokenizer_config.json").unlink()
    if damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}', encoding="utf-8")
    message = refusal(load_tokenizer, str(folder), "teacher.path")
    assert message.startswith(f"teacher.path: AutoTokenizer cannot load {str(folder)!r}: ")
    assert message.endswith("; give one that is whole, with its tokenizer")


def test_a_tokenizer_without_an_end_token_is_refused(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "eos_token"}), encoding="utf-8")
    assert refusal(load_tokenizer, str(folder), "teacher.path") == (
        f"teacher.path: the tokenizer of {str(folder)!r} has no end-of-text token; set one and save it again"
    )


# GGUF


def write_gguf(file, model, tokenizer) -> None:
    """As llama.cpp's converter does: fp32, query and key rows in its order of rotary halves."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        for part, count in heads.items():
            if part in name:
                rows = rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path, tokenizer):
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", make_llama(len(tokenizer)), tokenizer)
    return tmp_path / "gguf" / "tiny.gguf"


def test_a_gguf_file_is_found_by_its_name_and_by_its_folder(gguf_file):
    for path in (gguf_file, gguf_file.parent):
        assert find_model(str(path), "teacher.path") == gguf_file


def test_a_model_from_a_gguf_file_is_a_plain_one(gguf_file, tokenizer, tmp_path):
    model = load_model(str(gguf_file.parent), "teacher.path")
    expected = make_llama(len(tokenizer))
    input_ids = torch.arange(5, 25)[None]
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training
    model.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    assert torch.equal(load_model(str(tmp_path / "saved"), "x")(input_ids).logits, expected(input_ids).logits)


def test_a_gguf_file_in_bf16_keeps_its_rotary_frequencies(gguf_file):
    model, whole = (load_model(str(gguf_file), "teacher.path", dtype) for dtype in ("bfloat16", "float32"))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


def test_a_tokenizer_from_a_gguf_file_gives_the_same_ids(gguf_file, tokenizer):
    loaded = load_tokenizer(str(gguf_file), "teacher.path")
    text = "The cat likes milk.<|end|> Größe"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_a_file_that_is_no_gguf_is_refused(folder):
    assert refusal(find_model, str(folder / WEIGHTS), "teacher.path") == (
        f"teacher.path: {folder / WEIGHTS} is not a GGUF file; give a model folder or a whole .gguf file"
    )


@pytest.mark.parametrize("length", [4, 30, 2000, -100])
def test_a_torn_gguf_file_is_refused_when_it_is_loaded(gguf_file, length):
    gguf_file.write_bytes(gguf_file.read_bytes()[:length])
    assert refusal(load_model, str(gguf_file), "teacher.path").endswith("; give one that is whole, with its tokenizer")


def test_a_folder_of_two_gguf_files_is_refused(gguf_file):
    shutil.copy(gguf_file, gguf_file.with_name("other.gguf"))
    assert refusal(find_model, str(gguf_file.parent), "teacher.path") == (
        f"teacher.path: {str(gguf_file.parent)!r} is not a model folder (2 .gguf files); "
        "give the folder that save_pretrained wrote"
    )


def test_a_gpt2_folder_loads(tmp_path):
    model = make_gpt2(300)
    model.save_pretrained(tmp_path)
    input_ids = torch.arange(5, 25)[None]
    assert torch.equal(load_model(str(tmp_path), "student.path")(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("quantization, share", [("int8", 0.25), ("nf4", 0.125)])
def test_a_quantised_model_has_small_weights_and_a_plain_head(tmp_path, tokenizer, quantization, share):
    pytest.importorskip("bitsandbytes")
    make_llama(len(tokenizer)).save_pretrained(tmp_path)
    plain = load_model(str(tmp_path), "teacher.path")
    model = load_model(str(tmp_path), "teacher.path", quantization=quantization)
    sizes = [m.model.layers[0].mlp.up_proj.weight.untyped_storage().nbytes() for m in (model, plain)]
    assert sizes[0] == share * sizes[1] and type(model.lm_head) is torch.nn.Linear
    assert model.num_parameters() == plain.num_parameters()
    ids = torch.tensor([[5, 9, 13, 20, 7]], device=model.device)
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits.cpu(), plain(input_ids=ids.cpu()).logits
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.6
    assert LMHead.of(model).vocab == len(tokenizer)
