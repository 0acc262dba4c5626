"""abkd cache, whole: killed and gone on with, by several processes at once, refused, verified."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from conftest import make_llama, write_recipe
from safetensors.torch import load_file

from abkd import cli
from abkd.caching import writing
from abkd.teachers.cache import shards as shards_module
from abkd.teachers.cache.manifest import Manifest, shard_file
from abkd.teachers.cache.shards import claim_file


class World(NamedTuple):
    recipe: Path
    folder: Path
    teacher: Path
    data: Path

    def cache(self, name, *options, kind="top_k"):
        """The exit code; the cache is `folder / name`, a shard for each example."""
        given = ["--targets", kind, "--shard-tokens", "1", *options]
        return cli.main(["cache", str(self.recipe), "--output", str(self.folder / name), *given])

    def whole(self, name, *options, kind="top_k"):
        """The folder of a cache that is written once."""
        if not (self.folder / name).exists():
            assert self.cache(name, *options, kind=kind) == cli.DONE
        return self.folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer, teacher_folder, data_file):
    folder = tmp_path_factory.mktemp("world")
    return World(write_recipe(folder, teacher_folder, data_file), folder, teacher_folder, data_file)


def contents(folder):
    """name -> bytes, of all files but those that name the writer."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def one_line(capsys, *said):
    err = "".join(line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("abkd: "))
    assert err.count("\n") == 1, err
    for each in said:
        assert each in err, err
    return err


def in_a_process(target, *arguments, **options):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process


def _slowly(world, name, log, kind, stop_at=0, *, start=None, stop=signal.SIGKILL, victim=0):
    """Writes down which shards it wrote; in the middle of its shard `stop_at` it sends itself the signal `stop`, and
    after its third it kills the process `victim`."""
    write, save, numbers = writing.write_shard, shards_module.save_file, []

    def saved(tensors, file, metadata):
        save(tensors, file, metadata)
        if len(numbers) + 1 == stop_at and "shard-" in file.name:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), stop)

    def noted(folder, number, *arguments):
        time.sleep(0.01)
        write(folder, number, *arguments)
        numbers.append(number)
        if victim and len(numbers) == 3:
            os.kill(victim, signal.SIGKILL)
        with log.open("a") as stream:
            stream.write(f"{number}\n")

    shards_module.save_file, writing.write_shard = saved, noted
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if start is not None:
        start.wait()
    os._exit(world.cache(name, kind=kind))


@pytest.mark.parametrize("kind", ["top_k", "sampled", "hidden", "logits"])
def test_a_cache_killed_in_the_middle_of_a_shard_goes_on_to_the_same_files(world, kind, tmp_path, capsys):
    whole = world.whole(f"whole-{kind}", kind=kind)
    folder, log = world.folder / f"killed-{kind}", tmp_path / "log"
    for killed_at in (1, 4, 3):
        there = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*.safetensors")}
        process = in_a_process(_slowly, world, folder.name, log, kind, killed_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(folder.glob("shard-*.safetensors"))) == len(there) + killed_at - 1
        assert all(file.stat().st_mtime_ns == moment for file, moment in there.items())
        assert list(folder.glob(".shard-*")) and list(folder.glob("shard-*.claim"))
    assert cli.main(["cache", "verify", str(folder)]) == cli.USERS_MISTAKE
    assert capsys.readouterr().err.count("is missing; write it with the command that made the cache") == 7
    there = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*.safetensors")}
    assert world.cache(folder.name, kind=kind) == cli.DONE
    assert "going on: 5 of 12 shards are there" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == moment for file, moment in there.items())
    assert contents(folder) == contents(whole)
    assert world.cache(folder.name, kind=kind) == cli.DONE
    assert "is finished already" in capsys.readouterr().out
    assert cli.main(["cache", "verify", str(folder)]) == cli.DONE


def test_a_cache_killed_at_any_moment_goes_on_to_the_same_files(world, tmp_path):
    """Also while the model is loaded, and between manifest and tokenizer."""
    whole, dice = world.whole("whole-top_k"), random.Random(0)
    for _ in range(6):
        process = in_a_process(_slowly, world, "moments", tmp_path / "log", "top_k")
        time.sleep(dice.uniform(0.05, 0.4))
        process.kill()
        process.join()
    assert world.cache("moments") == cli.DONE
    found = contents(world.folder / "moments")
    left = {name for name in found if name.startswith((".tokenizer.", ".manifest")) or name.endswith(".claim")}
    assert {name: content for name, content in found.items() if name not in left} == contents(whole)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_write_one_cache_each_shard_once(world, num_processes, tmp_path):
    name, log = f"several-{num_processes}", tmp_path / "log"
    start = multiprocessing.get_context("fork").Barrier(num_processes)
    processes = [in_a_process(_slowly, world, name, log, "top_k", start=start) for _ in range(num_processes)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [cli.DONE] * num_processes
    assert sorted(map(int, log.read_text().split())) == list(range(12))
    assert contents(world.folder / name) == contents(world.whole("whole-top_k"))


def test_one_process_finishes_what_another_began_and_did_not_finish(world, tmp_path):
    log = tmp_path / "log"
    first = in_a_process(_slowly, world, "left", log, "top_k", 2, stop=signal.SIGSTOP)
    while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    second = in_a_process(_slowly, world, "left", log, "top_k", victim=first.pid)
    for process in (first, second):
        process.join()
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, cli.DONE)
    assert log.read_text().split() == [*"0", *"23456789", "10", "11", "1"]
    assert contents(world.folder / "left") == contents(world.whole("whole-top_k"))


def test_shards_that_another_machine_is_writing_are_left_to_it(world, capsys):
    folder = world.folder / "elsewhere"
    shutil.copytree(world.whole("whole-top_k"), folder)
    shard_file(folder, 5).unlink()
    claim_file(folder, 5).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1.0}))
    assert world.cache("elsewhere") == cli.DONE
    assert "the other 1 shards are being written by other processes" in capsys.readouterr().out
    assert cli.main(["cache", "info", str(folder)]) == cli.DONE
    assert "not finished: 1 shards are missing, 1 of them are being written" in capsys.readouterr().out
    assert not shard_file(folder, 5).exists()
    os.utime(claim_file(folder, 5), (time.time() - 200,) * 2)
    assert world.cache("elsewhere") == cli.DONE
    assert contents(folder) == contents(world.whole("whole-top_k"))


@pytest.mark.parametrize("kind", ["top_k", "sampled", "hidden", "logits"])
def test_the_size_is_said_before_and_not_exceeded(world, kind, capsys):
    folder = world.folder / f"size-{kind}"
    capsys.readouterr()
    assert (
        world.cache(folder.name, "--value-bits=9" if kind in ("top_k", "sampled") else "--batch-size=4", kind=kind) == 0
    )
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cache: ")]
    each = int(said.partition("at most ")[2].partition(" bytes each")[0].replace(",", ""))
    found = sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
    assert ("MiB for the output head" in said) == (kind == "hidden")
    manifest = Manifest.read(folder, "cache")
    assert manifest.num_tokens == 180 and found <= (each + 1) * 180
    assert found > each * 180 - 2048 * (len(manifest.shards) + 2) - 64 * manifest.num_examples


def test_the_largest_k_that_fits_into_bytes_is_taken(world):
    assert world.cache("bytes", "--bytes-per-token", "30", "--value-bits", "12") == cli.DONE
    assert Manifest.read(world.folder / "bytes", "cache").targets["k"] == (30 - 4) * 8 // (9 + 12)


def test_a_mass_keeps_fewer_classes(world):
    folder = world.whole("mass", "--top-p=0.5", "--k=290")
    assert "or those of mass 0.5" in Manifest.read(folder, "cache").described
    assert sum(map(len, contents(folder).values())) < sum(map(len, contents(world.whole("all", "--k=290")).values()))


def test_info_says_what_it_is(world, capsys):
    folder = world.whole("whole-top_k")
    capsys.readouterr()
    assert cli.main(["cache", "info", str(folder)]) == cli.DONE
    out = capsys.readouterr().out
    for said in (
        "targets: the 50 likeliest classes",
        "12 bits, ln p within 0.0078 nats; temperature 1",
        "12 examples, 180 tokens, 290 classes",
        f"path={world.teacher}",
        "data.prompt_format=chat",
        "shards: 12 of 12",
        "format 1",
    ):
        assert said in out


@pytest.mark.parametrize("victim", ["shard-00003.safetensors", "head.safetensors", "tokenizer/tokenizer.json"])
def test_verify_names_what_was_altered(world, victim, tmp_path, capsys):
    folder = tmp_path / "altered"
    shutil.copytree(world.whole("whole-hidden", kind="hidden"), folder)
    capsys.readouterr()
    content = (folder / victim).read_bytes()
    for altered in (content[: len(content) // 2], content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]):
        (folder / victim).write_bytes(altered)
        assert cli.main(["cache", "verify", str(folder)]) == cli.USERS_MISTAKE
        one_line(capsys, str((folder / victim).parent if "/" in victim else folder / victim))
    (folder / victim).write_bytes(content)
    assert cli.main(["cache", "verify", str(folder)]) == cli.DONE


def test_verify_names_every_problem(world, tmp_path, capsys):
    folder = tmp_path / "many"
    shutil.copytree(world.whole("whole-top_k"), folder)
    shard_file(folder, 1).unlink()
    shutil.copy(shard_file(folder, 0), shard_file(folder, 2))
    shutil.copy(shard_file(world.whole("whole-hidden", kind="hidden"), 3), shard_file(folder, 3))
    shard_file(folder, 4).write_bytes(b"")
    capsys.readouterr()
    assert cli.main(["cache", "verify", str(folder)]) == cli.USERS_MISTAKE
    err = capsys.readouterr().err
    assert all(str(shard_file(folder, number)) in err for number in (1, 2, 3, 4))
    assert sum(line.startswith("abkd: ") for line in err.splitlines()) == 4


@pytest.mark.parametrize("what", ["verify", "info"])
def test_no_cache_is_one_line(world, what, tmp_path, capsys):
    assert cli.main(["cache", what, str(tmp_path)]) == cli.USERS_MISTAKE
    one_line(capsys, "holds no cache")
    (tmp_path / "manifest.json").write_text("{")
    assert cli.main(["cache", what, str(tmp_path)]) == cli.USERS_MISTAKE
    one_line(capsys, "manifest.json cannot be read")
    assert cli.main(["cache", what]) == cli.USERS_MISTAKE
    one_line(capsys, f"cache {what}: give the folder of one cache, got 0")


def test_a_folder_that_holds_other_things_is_not_touched(world, capsys):
    folder = world.folder / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert world.cache("mine") == cli.USERS_MISTAKE
    one_line(capsys, "holds 'notes.txt' and no cache; give another folder")
    assert contents(folder) == {"notes.txt": b"mine"}
    assert world.cache("mine/notes.txt") == cli.USERS_MISTAKE
    one_line(capsys, "notes.txt' is no folder for a cache")
    assert world.cache("/proc/none/cache") == cli.USERS_MISTAKE
    one_line(capsys, "--output: '/proc/none/cache'")


@pytest.fixture
def trained_teacher(world, tokenizer, tmp_path):
    model = make_llama(len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-4
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--k=7"], ["targets.k=50, not 7"]),
        (["--value-bits=8"], ["targets.value_bits=12, not 8"]),
        (["--temperature=2"], ["targets.temperature=1.0, not 2.0"]),
        (["--top-p=0.9"], ["targets.top_p=1.0, not 0.9"]),
        (["--targets=logits"], ["targets.kind='top_k', not 'logits'"]),
        (["--shard-tokens=1000"], ["--shard-tokens='12 shards', not '1 shards'"]),
        (["data.max_train_rows=3"], ["data.max_train_rows=0, not 3"]),
        (["data.prompt_format=plain"], ["data.prompt_format='chat', not 'plain'"]),
        (["teacher.dtype=bfloat16"], ["teacher.0.dtype='float32', not 'bfloat16'"]),
    ],
)
def test_other_options_cannot_go_on_with_a_cache(world, options, said, capsys):
    before = contents(world.whole("whole-top_k"))
    capsys.readouterr()
    assert world.cache("whole-top_k", *options) == cli.USERS_MISTAKE
    one_line(capsys, "was started with", *said)
    assert contents(world.folder / "whole-top_k") == before


def test_a_teacher_that_was_trained_cannot_go_on_with_a_cache(world, trained_teacher, capsys):
    world.whole("whole-top_k")
    capsys.readouterr()
    assert world.cache("whole-top_k", f"teacher.path={trained_teacher}") == cli.USERS_MISTAKE
    one_line(capsys, "was started with teacher.0.weights='", ", not '")


def test_the_same_weights_under_another_config_cannot_go_on_with_a_cache(world, tmp_path, capsys):
    shutil.copytree(world.teacher, tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    world.whole("whole-top_k")
    capsys.readouterr()
    assert world.cache("whole-top_k", f"teacher.path={tmp_path / 'teacher'}") == cli.USERS_MISTAKE
    one_line(capsys, "was started with teacher.0.config='", ", not '")


def test_the_same_teacher_and_the_same_data_at_another_path_go_on(world, tmp_path, capsys):
    shutil.copytree(world.teacher, tmp_path / "teacher")
    shutil.copy(world.data, tmp_path / "data.jsonl")
    moved = [f"teacher.path={tmp_path / 'teacher'}", f"data.train={tmp_path / 'data.jsonl'}"]
    world.whole("whole-top_k")
    assert world.cache("whole-top_k", *moved) == cli.DONE
    assert "is finished already" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(world, monkeypatch, capsys):
    def full(tensors, file, metadata):
        if "shard-00002" in str(file):
            raise OSError(28, "No space left on device")
        save(tensors, file, metadata)

    save = shards_module.save_file
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "save_file", full)
        assert world.cache("full") == cli.USERS_MISTAKE
    one_line(capsys, "shard-00002.safetensors cannot be written ([Errno 28]", "go on with the same command")
    assert len(list((world.folder / "full").glob("shard-*"))) == 2
    assert world.cache("full") == cli.DONE
    assert contents(world.folder / "full") == contents(world.whole("whole-top_k"))


def test_a_disk_that_is_too_small_is_refused_before(world, monkeypatch, capsys):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: os.terminal_size((1, 1)))
    monkeypatch.setattr(os.terminal_size, "free", 10, raising=False)
    assert world.cache("small") == cli.USERS_MISTAKE
    one_line(capsys, "needs 0.00 GiB, 0.00 GiB are free; free some, give another folder, or keep less of each token")
    assert not (world.folder / "small").exists()


def test_a_claim_that_cannot_be_made_is_one_line(world, monkeypatch, capsys):
    def refuse(file):
        raise PermissionError(30, "Read-only file system", str(file))

    monkeypatch.setattr(writing, "claim", refuse)
    assert world.cache("read-only") == cli.USERS_MISTAKE
    one_line(capsys, "--output: ", "Read-only file system")


def test_a_cache_is_written_out_of_another(world, capsys):
    """From hidden states the same bytes as from the model; of top-k targets the first of each row."""
    whole = ["--k=290", "--value-bits=16"]
    student = f"student={{kind: pretrained, path: {world.teacher}}}"

    def teacher(folder, tail=""):
        return [f"teacher={{kind: cached, path: {folder}{tail}}}", student]

    hidden, direct = world.whole("whole-hidden", kind="hidden"), world.whole("direct", *whole)
    assert world.cache("again", *whole, *teacher(hidden)) == cli.DONE
    expected, found = (safetensors_of(world.folder / name, 5) for name in ("direct", "again"))
    assert all(expected[name].equal(found[name]) for name in ("keys", "num_kept", "entries.starts"))
    assert world.cache("first", "--k=20", *teacher(direct, ", tail: uniform")) == cli.DONE
    expected, found = (safetensors_of(folder, 5) for folder in (world.whole("20", "--k=20"), world.folder / "first"))
    assert (found["num_kept"] == 20).all() and found["entries"].shape == expected["entries"].shape
    capsys.readouterr()
    for name, options, said in (
        ("whole-sampled", [], "this teacher gives a sample, which is no teacher for another cache"),
        ("20", ["--k=21"], "this teacher gives 20 classes of a token"),
        ("20", ["--targets=logits"], "--targets logits: this teacher does not give them"),
        ("20", ["--temperature=2"], "teacher_temperature is 2.0, and these top-k targets were made at 1.0"),
    ):
        folder = world.whole(name, kind="sampled" if "sampled" in name else "top_k")
        tail = "" if "sampled" in name else ", tail: uniform"
        capsys.readouterr()
        assert world.cache("never", *options, *teacher(folder, tail)) == cli.USERS_MISTAKE
        one_line(capsys, said)


def safetensors_of(folder, number):
    return load_file(shard_file(folder, number))


NO_TORCH = """
import contextlib, io, json, sys
from abkd import cli
recipe, folder, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for options in cases:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(["cache", *[option.format(recipe=recipe, folder=folder) for option in options]])
        except SystemExit as error:
            code = error.code
    assert "torch" not in sys.modules, options
    print(json.dumps([code, err.getvalue()]))
"""
ALONE = ["teacher=null", "objective.kd_weight=0", "objective.ce_weight=1", "student={{kind: pretrained, path: x}}"]
MISTAKES = [
    (["{recipe}"], "--output: missing"),
    *(
        (["{recipe}", "--output={folder}/x", *options], said)
        for options, said in [
            (["--k=0"], "--k=0: must be at least 1"),
            (["--k=40000"], "--k=40000: must be at most 32767"),
            (["--k=x"], "invalid int value: 'x'"),
            (["--exact=2"], "--exact=2: is of --targets sampled"),
            (["--targets=sampled", "--exact=-1"], "--exact=-1: must be at least 0"),
            (["--targets=some"], "invalid choice: 'some'"),
            (["--top-p=0"], "--top-p=0: must be above 0, at most 1"),
            (["--targets=hidden", "--value-bits=8"], "--value-bits: --targets hidden keeps everything"),
            (["--seed=3"], "--seed=3: is of the draws of --targets sampled"),
            (["--top-p=nan"], "--top-p=nan: must be above 0, at most 1"),
            (["--top-p=0.5", "--targets=sampled"], "--top-p=0.5: is of --targets top_k"),
            (["--bytes-per-token=9", "--k=3"], "--k and --bytes-per-token say the same"),
            (["--bytes-per-token=0"], "--bytes-per-token=0: must be at least 1"),
            (["--value-bits=3"], "--value-bits=3: must lie between 4 and 16"),
            (["--value-bits=17"], "--value-bits=17: must lie between 4 and 16"),
            (["--temperature=0"], "--temperature=0: must be above 0"),
            (["--temperature=inf"], "--temperature=inf: must be above 0"),
            (["--temperature=2", "--targets=hidden"], "--temperature: --targets hidden keeps everything"),
            (["--k=5", "--targets=logits"], "--k: --targets logits keeps everything"),
            (["--dtype=float16"], "--dtype=float16: is of hidden states and logits"),
            (["--dtype=int8", "--targets=hidden"], "invalid choice: 'int8'"),
            (["--shard-tokens=0"], "--shard-tokens=0: must be at least 1"),
            (["--batch-size=0"], "--batch-size=0: must be at least 1"),
            (["--colour=red"], "unrecognized arguments: --colour=red"),
            (ALONE, "teacher: there is none to be cached"),
            (["data.train=nowhere.jsonl"], "data.train: "),
            (["teacher.path=./nowhere"], "teacher.path: "),
        ]
    ),
    (["resnet56_resnet20", "--output={folder}/x"], "--targets=top_k: is of language models"),
    (["no_recipe", "--output={folder}/x"], "no_recipe"),
    (["info", "{folder}", "--k=3"], "--k: is for writing a cache; leave it out of cache info"),
    (["{recipe}", "--output={folder}"], "and no cache; give another folder"),
]  # fmt: skip


def test_mistakes_are_one_line_before_torch_is_loaded(world, tmp_path):
    (tmp_path / "other").touch()
    cases = json.dumps([options for options, _ in MISTAKES])
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(world.recipe), str(tmp_path), cases], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, (options, said) in zip(done.stdout.splitlines(), MISTAKES, strict=True):
        code, err = json.loads(line)
        lines = [each for each in err.splitlines() if each.startswith("abkd: ") or ": error: " in each]
        assert code == cli.USERS_MISTAKE and len(lines) == 1 and said in lines[0], (options, err)
        assert "Traceback" not in err
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--bytes-per-token=5"], "--bytes-per-token=5: one class takes 6.6; raise it"),
        (["--targets=sampled", "--k=300", "--exact=0"], "of k=290 classes 1 to 255 are draws; set it between 35 and"),
        (["--targets=sampled", "--k=5", "--exact=5"], "--exact=5: of k=5 classes 1 to 255 are draws; set it between"),
    ],
)
def test_what_only_the_vocabulary_refuses_is_one_line(world, options, said, capsys):
    assert world.cache("never", *options) == cli.USERS_MISTAKE
    one_line(capsys, said)
    assert not (world.folder / "never").exists()


def test_files_are_readable_for_whom_the_umask_lets_read(world):
    before = os.umask(0o027)
    try:
        folder = world.whole("modes", kind="hidden")
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in folder.glob("*.safetensors")} == {
        file.name: "0o640" for file in folder.glob("*.safetensors")
    }


def test_wide_rows_make_smaller_shards(monkeypatch):
    from abkd.caching.options import SHARD_ROWS
    from abkd.caching.texts import SHARD_BYTES, _shard_tokens
    from abkd.teachers.cache.encoding import DenseEncoding, KeptEncoding

    assert _shard_tokens(KeptEncoding(49_152)) == SHARD_ROWS
    assert _shard_tokens(DenseEncoding(576, torch.float16)) == SHARD_ROWS
    wide = _shard_tokens(DenseEncoding(49_152, torch.float32))
    assert wide * 49_152 * 4 <= SHARD_BYTES < (wide + 1) * 49_152 * 4
