"""Shards that were torn, altered or exchanged are found and named."""

import os
import random
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abkd import InputError
from abkd.teachers.cache.manifest import shard_file
from abkd.teachers.cache.shards import KEYS, Shard, checksum, drop_parts, read_keys, write_shard

KEYS_GIVEN = [11, -5, 2**62]
CACHE = "00112233aabbccdd"


def examples():
    """Of 0, 1 and 5 tokens."""
    return [
        {"rows": torch.randn(n, 4).to(torch.bfloat16), "counts": torch.arange(3 * n, dtype=torch.uint8)}
        for n in (5, 0, 1)
    ]


@pytest.fixture
def shard(tmp_path):
    """(folder, what was written into shard 3)."""
    given = examples()
    write_shard(tmp_path, 3, CACHE, KEYS_GIVEN, given)
    return tmp_path, given


def refusal(folder, number=3, cache=CACHE):
    with pytest.raises(InputError) as caught:
        Shard.read(folder, number, cache, "teacher.path")
    line = str(caught.value)
    assert "\n" not in line and line.startswith("teacher.path: ") and str(shard_file(folder, number)) in line
    return line


def test_what_was_written_is_read(shard):
    folder, given = shard
    found = Shard.read(folder, 3, CACHE, "cache")
    assert found.keys.tolist() == KEYS_GIVEN == read_keys(folder, 3, CACHE, "cache").tolist()
    for index, example in enumerate(given):
        read = found.example(index)
        assert read.keys() == example.keys()
        assert all(read[name].equal(tensor) for name, tensor in example.items())
    assert [file.name for file in folder.iterdir()] == ["shard-00003.safetensors"]


def test_the_same_content_is_the_same_file(shard, tmp_path):
    folder, given = shard
    (tmp_path / "again").mkdir()
    write_shard(tmp_path / "again", 3, CACHE, KEYS_GIVEN, given)
    assert shard_file(tmp_path / "again", 3).read_bytes() == shard_file(folder, 3).read_bytes()


def test_a_shard_that_ends_early_is_torn(shard):
    folder, _ = shard
    file = shard_file(folder, 3)
    whole = file.read_bytes()
    lengths = {len(whole) * eighth // 8 for eighth in range(8)} | {1, 7, 8, 9, len(whole) - 1}
    for length in sorted(lengths):
        file.write_bytes(whole[:length])
        assert "is torn" in refusal(folder)
    file.write_bytes(whole + b"x")
    assert "is torn" in refusal(folder)
    file.unlink()
    assert "is missing" in refusal(folder)


def test_a_byte_that_changed_anywhere_is_found(shard):
    """Every byte of the header and of the data, with one bit or with all."""
    folder, _ = shard
    file = shard_file(folder, 3)
    whole = file.read_bytes()
    dice = random.Random(1)
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 255 if place % 3 == 0 else 1 << dice.randrange(8)
        file.write_bytes(altered)
        line = refusal(folder)
        assert "is torn" in line or "was altered" in line or "of another cache" in line


def test_every_other_content_of_a_byte_of_the_header_is_found_or_says_the_same(shard):
    """A space of the padding may become a tab; names, types and shapes may not change."""
    folder, given = shard
    file = shard_file(folder, 3)
    whole = file.read_bytes()
    dice, num_same = random.Random(2), 0
    for place in [dice.randrange(8 + int.from_bytes(whole[:8], "little")) for _ in range(400)]:
        altered = bytearray(whole)
        altered[place] = dice.randrange(256)
        file.write_bytes(altered)
        try:
            found = Shard.read(folder, 3, CACHE, "cache")
        except InputError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            continue
        num_same += 1
        assert found.keys.tolist() == KEYS_GIVEN and found.example(0)["rows"].equal(given[0]["rows"])
    assert num_same < 10


def test_the_keys_alone_are_never_read_from_a_torn_header(shard):
    folder, _ = shard
    file = shard_file(folder, 3)
    whole = file.read_bytes()
    dice = random.Random(3)
    for place in [dice.randrange(8 + int.from_bytes(whole[:8], "little")) for _ in range(300)]:
        altered = bytearray(whole)
        altered[place] ^= dice.randrange(1, 256)
        file.write_bytes(altered)
        try:
            read_keys(folder, 3, CACHE, "cache")
        except InputError as error:
            assert str(file) in str(error) and "\n" not in str(error)


def test_a_shard_of_another_cache_or_place_is_found(shard):
    folder, given = shard
    assert "is a shard of another cache" in refusal(folder, cache="ffffffffffffffff")
    os.rename(shard_file(folder, 3), shard_file(folder, 4))
    assert "or another shard of this one" in refusal(folder, number=4)
    with pytest.raises(InputError, match=r"shard-00004\.safetensors is a shard of another cache"):
        read_keys(folder, 4, CACHE, "cache")
    write_shard(folder, 3, CACHE, KEYS_GIVEN, given)
    assert Shard.read(folder, 3, CACHE, "cache").keys.tolist() == KEYS_GIVEN


def test_another_file_of_the_same_format_is_found(shard):
    folder, _ = shard
    save_file({"weight": torch.ones(3)}, shard_file(folder, 3))
    assert "of another cache" in refusal(folder)
    with pytest.raises(InputError, match="is torn"):
        read_keys(folder, 3, CACHE, "cache")
    shard_file(folder, 3).unlink()
    shard_file(folder, 3).mkdir()
    assert "is torn" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"rows": tensors["rows"].view(torch.float16)},
        lambda tensors: tensors | {"rows": tensors["rows"].reshape(-1, 2)},
        lambda tensors: {**tensors, "other": tensors["counts"]},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != KEYS},
        lambda tensors: tensors | {KEYS: tensors[KEYS].flip(0)},
    ],
)
def test_the_checksum_is_of_names_types_shapes_and_bytes(shard, change):
    tensors = load_file(shard_file(shard[0], 3))
    assert checksum(tensors) == checksum(dict(reversed(tensors.items())))
    assert checksum(change(tensors)) != checksum(tensors)


def test_what_is_left_of_a_killed_process_is_dropped_with_its_shard(tmp_path):
    parts = [tmp_path / f".shard-0000{number}.safetensors.host-1-ab" for number in (1, 2)]
    for part in parts:
        part.touch()
    drop_parts(tmp_path, 1)
    assert [part.exists() for part in parts] == [False, True]


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"shard-00000\.safetensors cannot be written \(.*\); free some disk, then"
        ):
            write_shard(tmp_path, 0, CACHE, [1], [{"rows": torch.zeros(3000, 4)}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_shard(Path(tmp_path / "gone"), 0, CACHE, [1], [{"rows": torch.zeros(1, 1)}])
