import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from abkd import InputError
from abkd.teachers.cache import manifest as manifest_module
from abkd.teachers.cache.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    check_output,
    digest_of,
    example_key,
    first_difference,
    shard_file,
)


def make_manifest(**changes):
    given = {
        "task": "language_model",
        "targets": {"kind": "top_k", "k": 50, "top_p": 1.0, "value_bits": 12, "temperature": 1.0},
        "vocab": 290,
        "teacher": {"identity": [{"weights": "0a", "dtype": "float32"}], "section": {"path": "t"}, "revision": None},
        "tokenizer": {"vocabulary": "1b", "chat_template": "2c"},
        "data": {"data.prompt_format": "chat", "data.train": "a.jsonl", "digest": "3d"},
        "shards": [[3, 40], [2, 21]],
        "version": "0.1.0",
    }
    return Manifest(**(given | changes))


def refusal(call, *arguments):
    """The one line of an InputError."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_is_read_back(tmp_path):
    manifest = make_manifest()
    manifest.write(tmp_path / "new" / "cache")
    assert Manifest.read(tmp_path / "new" / "cache", "cache") == manifest
    assert [file.name for file in (tmp_path / "new" / "cache").iterdir()] == [MANIFEST]
    assert (manifest.num_examples, manifest.num_tokens) == (5, 61)
    before = (tmp_path / "new" / "cache" / MANIFEST).read_bytes()
    replace(manifest, version="0.2.0").write(tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache" / MANIFEST).read_bytes() == before


def test_no_cache_names_the_command(tmp_path):
    assert f"{str(tmp_path)!r} holds no cache" in (line := refusal(Manifest.read, tmp_path, "teacher.path"))
    assert line.startswith("teacher.path: ") and "abkd cache RECIPE --output" in line


def test_a_torn_manifest_is_named_wherever_it_is_cut(tmp_path):
    make_manifest().write(tmp_path)
    file = tmp_path / MANIFEST
    whole = file.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        file.write_bytes(whole[:length])
        assert str(file) in refusal(Manifest.read, tmp_path, "cache")


def test_what_was_altered_is_named(tmp_path):
    make_manifest().write(tmp_path)
    file = tmp_path / MANIFEST
    content = json.loads(file.read_text())
    for key in content:
        file.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
        line = refusal(Manifest.read, tmp_path, "cache")
        assert str(file) in line and (f"lacks {key}" in line or key == "format"), line
    for key, value in (("vocab", 291), ("targets", {}), ("shards", 5), ("teacher", None), ("task", "x")):
        file.write_text(json.dumps(content | {key: value}))
        assert "was altered" in refusal(Manifest.read, tmp_path, "cache")
    for value in (FORMAT + 1, "1", None):
        file.write_text(json.dumps(content | {"format": value}))
        assert f"is of format {value!r}, and this abkd reads format {FORMAT}" in refusal(Manifest.read, tmp_path, "c")
    for text in ("[]", "5", "\x00", "null"):
        file.write_text(text)
        assert str(file) in refusal(Manifest.read, tmp_path, "cache")
    file.write_bytes(b"\xff\xfe")
    assert str(file) in refusal(Manifest.read, tmp_path, "cache")


@pytest.mark.parametrize(
    "change, field, there, here",
    [
        ({"task": "image_classification"}, "task", "'language_model'", "'image_classification'"),
        ({"targets": make_manifest().targets | {"k": 7}}, "targets.k", "50", "7"),
        ({"targets": make_manifest().targets | {"temperature": 2.0}}, "targets.temperature", "1.0", "2.0"),
        ({"targets": {"kind": "logits", "width": 3}}, "targets.kind", "'top_k'", "'logits'"),
        ({"vocab": 288}, "vocab", "290", "288"),
        ({"teacher": make_manifest().teacher | {"identity": [{"weights": "ff"}]}}, "teacher.0.weights", "'0a'", "'ff'"),
        ({"tokenizer": {"vocabulary": "1b", "chat_template": "ee"}}, "tokenizer.chat_template", "'2c'", "'ee'"),
        (
            {"data": {"data.prompt_format": "alpaca", "data.train": "b.jsonl", "digest": "4e"}},
            "data.prompt_format",
            "'chat'",
            "'alpaca'",
        ),
        (
            {"data": {"data.prompt_format": "chat", "data.train": "b.jsonl", "digest": "4e"}},
            "data.train",
            "'a.jsonl'",
            "'b.jsonl'",
        ),
        ({"shards": [[5, 61]]}, "--shard-tokens", "'2 shards'", "'1 shards'"),
    ],
)
def test_another_cache_is_refused_by_field_and_both_values(tmp_path, change, field, there, here):
    make_manifest().write(tmp_path)
    before = (tmp_path / MANIFEST).read_bytes()
    line = refusal(make_manifest(**change).write, tmp_path)
    assert line.startswith("--output: ") and f"was started with {field}=" in line
    first, second = line.split(", not ")
    assert there in first and here in second and len(line) < 400
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_many_shards_make_no_long_line(tmp_path):
    make_manifest(shards=[[1, 9]] * 5000).write(tmp_path)
    assert len(refusal(make_manifest(shards=[[1, 9]] * 4000).write, tmp_path)) < 400


def test_the_same_texts_under_another_name_and_another_path_of_the_teacher_are_the_same(tmp_path):
    make_manifest().write(tmp_path)
    data = {"data.prompt_format": "chat", "data.train": "copy.jsonl", "digest": "3d"}
    moved = make_manifest(data=data, teacher=make_manifest().teacher | {"section": {"path": "moved"}})
    moved.write(tmp_path)
    assert moved.digest == make_manifest().digest != make_manifest(vocab=3).digest


def test_a_folder_that_holds_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for check in (make_manifest().write, check_output):
        assert "holds 'thesis.tex' and no cache; give another folder" in refusal(check, tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
        assert "is no folder for a cache" in refusal(check, tmp_path / "thesis.tex")
        assert "thesis.tex" in refusal(check, tmp_path / "thesis.tex" / "cache")
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_a_folder_that_cannot_be_made_is_one_line():
    assert "--output: '/proc/nothing/cache' cannot be written" in refusal(
        make_manifest().write, Path("/proc/nothing/cache")
    )


def test_an_empty_folder_and_one_that_a_killed_process_left_are_taken(tmp_path):
    (tmp_path / ".manifest-123-ab").write_text('{"torn')
    make_manifest().write(tmp_path)
    assert Manifest.read(tmp_path, "cache") == make_manifest()


def test_without_links_it_is_renamed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(manifest_module.os, "link", refuse)
    make_manifest().write(tmp_path)
    make_manifest().write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [MANIFEST]
    assert Manifest.read(tmp_path, "cache") == make_manifest()


def _write(folder, manifest, start, results):
    start.wait()
    try:
        manifest.write(folder)
        results.put(None)
    except InputError as error:
        results.put(str(error))


def at_once(folder, manifests):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(len(manifests)), context.Queue()
    processes = [context.Process(target=_write, args=(folder, each, start, results)) for each in manifests]
    for process in processes:
        process.start()
    said = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return said


def test_several_processes_with_the_same_manifest_all_go_on(tmp_path):
    for attempt in range(3):
        assert at_once(tmp_path / str(attempt), [make_manifest()] * 3) == [None] * 3
        assert os.listdir(tmp_path / str(attempt)) == [MANIFEST]


def test_of_several_processes_with_different_manifests_the_first_goes_on(tmp_path):
    for attempt in range(3):
        manifests = [make_manifest(vocab=vocab) for vocab in (300, 400, 500)]
        said = at_once(tmp_path / str(attempt), manifests)
        assert said.count(None) == 1
        won = Manifest.read(tmp_path / str(attempt), "cache").vocab
        assert all(f"was started with vocab={won}, not " in line for line in said if line)
        assert os.listdir(tmp_path / str(attempt)) == [MANIFEST]


def test_missing_shards_and_the_task_are_named(tmp_path):
    manifest = make_manifest()
    manifest.write(tmp_path)
    shard_file(tmp_path, 0).touch()
    assert manifest.missing_shards(tmp_path) == [1]
    line = refusal(manifest.check_complete, tmp_path, "teacher.path")
    assert "1 of 2 shards are missing, the first is shard-00001.safetensors" in line
    shard_file(tmp_path, 1).touch()
    manifest.check_complete(tmp_path, "teacher.path")
    assert "the cache is for task=language_model, and this recipe is for task=image_classification" in refusal(
        manifest.check_task, "image_classification", "teacher.path"
    )


@pytest.mark.parametrize(
    "targets, tail, said",
    [
        ({"kind": "top_k", "k": 3, "top_p": 1.0}, None, "teacher.tail: missing"),
        ({"kind": "top_k", "k": 3, "top_p": 1.0}, "uniform", ""),
        ({"kind": "sampled", "num_exact": 3, "num_draws": 4}, "uniform", "teacher.tail=uniform: the cache holds the 3"),
        ({"kind": "hidden", "width": 3, "dtype": "float32"}, "lump", "the cache holds hidden states, 3 x float32"),
        ({"kind": "logits", "width": 3, "dtype": "float32"}, "lump", "the cache holds logits, 3 x float32"),
        ({"kind": "logits", "width": 3, "dtype": "float32"}, None, ""),
    ],
)
def test_a_tail_is_for_top_k_targets(targets, tail, said):
    manifest = make_manifest(targets=targets)
    if not said:
        manifest.check_tail(tail, "teacher.tail")
        return
    assert said in refusal(manifest.check_tail, tail, "teacher.tail")


def test_digests_and_keys_do_not_change_with_the_process_or_the_order():
    assert digest_of({"a": 1, "b": [2.0]}) == digest_of({"b": [2.0], "a": 1}) == "be9632fc0c315c13"
    assert example_key((1, 2), (3,)) == example_key((1, 2), (3,)) == -5663670070210458686
    others = [((1,), (2, 3)), ((1, 2, 3), ()), ((12,), (3,)), ((1, 2), (4,)), ((), (1, 2, 3))]
    assert len({example_key(*each) for each in [*others, ((1, 2), (3,))]}) == 6


def test_the_first_difference_is_the_innermost():
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    assert first_difference({"a": [{"b": 1}, 2]}, {"a": [{"b": 1}, 3]}) == ("a.1", 2, 3)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])
