import os

import numpy as np
import pytest
import torch
from test_cache_manifest import make_manifest

from abkd import InputError
from abkd.teachers.cache import store as store_module
from abkd.teachers.cache.manifest import example_key, shard_file
from abkd.teachers.cache.shards import write_shard
from abkd.teachers.cache.store import Store

SIZES = (4, 1, 6)


def rows_of(key):
    """What the cache holds of an example: different for each."""
    return torch.full((abs(key) % 3, 2), float(key % 1000))


def write(folder, sizes=SIZES, **changes):
    """(manifest, keys by shard), its first three shards written."""
    manifest = make_manifest(shards=[[size, 10] for size in sizes], **changes)
    manifest.write(folder)
    names = iter(range(sum(sizes)))
    keys = [[example_key((next(names),), (1,)) for _ in range(size)] for size in sizes]
    for number, part in enumerate(keys):
        write_shard(folder, number, manifest.digest, part, [{"rows": rows_of(key)} for key in part])
    return manifest, keys


@pytest.fixture
def cache(tmp_path):
    manifest, keys = write(tmp_path)
    return tmp_path, manifest, keys


def refusal(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_example_is_found_by_its_key_and_no_other(cache):
    folder, manifest, keys = cache
    flat = [key for part in keys for key in part]
    store = Store(folder, manifest, "cache")
    where = store.find(flat[::-1])
    assert len(set(where.tolist())) == len(flat) and where.min() >= 0
    for key, place in zip(flat[::-1], where, strict=True):
        assert store.example(place)["rows"].equal(rows_of(key))
    others = [key + 1 for key in flat] + [-(2**63), 2**63 - 1, 0]
    assert (store.find(others) == -1).all()
    assert store.find([]).shape == (0,)


def test_a_shard_is_read_when_it_is_needed_and_once(cache, monkeypatch):
    folder, manifest, keys = cache
    numbers, read = [], store_module.Shard.read

    def counted(folder, number, *arguments):
        numbers.append(number)
        return read(folder, number, *arguments)

    monkeypatch.setattr(store_module.Shard, "read", counted)
    store = Store(folder, manifest, "cache")
    assert numbers == []
    for key in [keys[2][3], keys[2][0], keys[0][1], keys[2][3]]:
        store.example(store.find([key])[0])
    assert numbers == [2, 0]


def test_rows_are_the_mapped_file(cache):
    folder, manifest, keys = cache
    store = Store(folder, manifest, "cache")
    key = next(key for key in keys[2] if abs(key) % 3)
    found = store.example(store.find([key])[0])["rows"]
    first = store.shard(2).tensors["rows"]
    assert first.data_ptr() <= found.data_ptr() < first.data_ptr() + first.nbytes
    with open("/proc/self/maps") as maps:
        assert str(shard_file(folder, 2)) in maps.read()


def test_a_missing_shard_is_named_at_once(cache):
    folder, manifest, _ = cache
    shard_file(folder, 1).unlink()
    assert "1 of 3 shards are missing, the first is shard-00001" in refusal(lambda: Store(folder, manifest, "cache"))


def test_torn_headers_and_strangers_are_named_at_once(cache, tmp_path_factory):
    folder, manifest, _ = cache
    whole = shard_file(folder, 1).read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        shard_file(folder, 1).write_bytes(whole[:length])
        assert f"{shard_file(folder, 1)} is torn" in refusal(lambda: Store(folder, manifest, "cache"))
    other = tmp_path_factory.mktemp("other")
    write(other, vocab=3)
    os.replace(shard_file(other, 1), shard_file(folder, 1))
    assert f"{shard_file(folder, 1)} is a shard of another cache" in refusal(lambda: Store(folder, manifest, "cache"))
    shard_file(folder, 1).write_bytes(shard_file(folder, 0).read_bytes())
    assert "or another shard of this one" in refusal(lambda: Store(folder, manifest, "cache"))


def test_altered_data_is_named_when_it_is_read_and_by_a_check(cache):
    folder, manifest, keys = cache
    file = shard_file(folder, 2)
    altered = bytearray(file.read_bytes())
    altered[-1] ^= 1
    file.write_bytes(altered)
    store = Store(folder, manifest, "cache")
    store.example(store.find([keys[0][0]])[0])
    assert f"{file} was altered" in refusal(lambda: store.example(store.find([keys[2][0]])[0]))
    assert f"{file} was altered" in refusal(store.check)


def test_many_examples(tmp_path):
    sizes = (700, 1, 300)
    manifest, keys = write(tmp_path, sizes)
    flat = np.array([key for part in keys for key in part])
    store = Store(tmp_path, manifest, "cache")
    order = np.random.default_rng(0).permutation(len(flat))
    assert np.argsort(store.find(flat[order].tolist())).shape == (1001,)
    assert all(store.example(w)["rows"].equal(rows_of(int(k))) for w, k in zip(store.find(flat), flat, strict=True))
