import io
import os
import pickle
import pickletools
import struct
import tarfile
from typing import ClassVar

import numpy as np
import pytest

from abkd import InputError
from abkd.data import cifar_files
from abkd.data.image_files import read_images

IMAGES = np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3), dtype=np.uint8)


class Python2Pickler(pickle._Pickler):
    """Writes as the official files are written: protocol 2, byte strings, numpy's module of old."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data):
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes

    def save_str(self, text):
        self.save_bytes(text.encode())

    dispatch[str] = save_str

    def save_global(self, obj, name=None):
        module, name = obj.__module__, obj.__name__
        self.write(f"c{module.replace('numpy._core', 'numpy.core')}\n{name}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global
    dispatch[type(len)] = save_global
    dispatch[type(lambda: 0)] = save_global


def python2(content):
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


def python3(content, protocol=2):
    return pickle.dumps(content, protocol=protocol)


def rows(images):
    """As in the files: `[n, 3072]`, all red values, all green, all blue."""
    return np.stack([np.concatenate([image[..., channel].ravel() for channel in range(3)]) for image in images])


def write_cifar10(folder, dump=python2):
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(dump({b"label_names": [b"cat", b"dog"], b"num_vis": 3072}))
    for number in range(5):
        batch = IMAGES[2 * number : 2 * number + 2]
        content = {b"batch_label": b"b", b"labels": [0, 1], b"data": rows(batch), b"filenames": [b"a.png", b"b.png"]}
        (folder / f"data_batch_{number + 1}").write_bytes(dump(content))
    (folder / "test_batch").write_bytes(dump({b"labels": [1, 0], b"data": rows(IMAGES[10:])}))
    return folder


def write_cifar100(folder):
    folder.mkdir(parents=True)
    names = {b"fine_label_names": [b"apple", b"boy"], b"coarse_label_names": [b"all"]}
    (folder / "meta").write_bytes(python2(names))
    for name, images in (("train", IMAGES[:10]), ("test", IMAGES[10:])):
        fine = [index % 2 for index in range(len(images))]
        content = {b"fine_labels": fine, b"coarse_labels": [0] * len(images), b"data": rows(images)}
        (folder / name).write_bytes(python2(content))
    return folder


def test_the_stand_in_is_written_as_the_official_files_are():
    data = python2({b"data": rows(IMAGES[:1])})
    assert data.startswith(b"\x80\x02}") and b"cnumpy.core.multiarray\n_reconstruct\n" in data
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert "BINSTRING" in opcodes and not opcodes & {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINBYTES"}


@pytest.mark.parametrize("dump", [python2, python3])
def test_cifar10(tmp_path, dump):
    path = write_cifar10(tmp_path / "cifar-10-batches-py", dump)
    train = read_images(str(path), "data.train", split="train")
    assert np.array_equal(train.images, IMAGES[:10]) and train.images.dtype == np.uint8
    assert train.labels.tolist() == [0, 1] * 5 and train.classes == ("cat", "dog")
    test = read_images(str(tmp_path), "data.test", split="test")  # the folder that it was unpacked in
    assert np.array_equal(test.images, IMAGES[10:]) and test.labels.tolist() == [1, 0]
    assert (train.origin, test.origin) == (f"{path} [train]", f"{path} [test]")


def test_cifar100_has_its_fine_labels(tmp_path):
    path = write_cifar100(tmp_path / "cifar-100-python")
    train = read_images(str(path), "data.train", split="train")
    assert np.array_equal(train.images, IMAGES[:10]) and train.classes == ("apple", "boy")
    assert train.labels.tolist() == [0, 1] * 5


@pytest.mark.parametrize("write", [write_cifar10, write_cifar100])
def test_an_archive_is_read_as_downloaded(tmp_path, write):
    folder = write(tmp_path / "inside")
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="cifar")
    for split in ("train", "test"):
        packed = read_images(str(tmp_path / "cifar.tar.gz"), "data.train", split=split)
        assert np.array_equal(packed.images, read_images(str(folder), "data.train", split=split).images)


class Attack:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "touch {mark}"),
        Attack(eval, "open('{mark}', 'w')"),
        Attack(np.load, "{mark}"),
        Attack(getattr, Attack(np.dtype, "u1"), "type"),
    ],
    ids=["system", "eval", "numpy.load", "getattr"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path, attack, protocol):
    mark = tmp_path / "mark"
    path = write_cifar10(tmp_path / "cifar")
    attack.arguments = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in attack.arguments)
    (path / "data_batch_3").write_bytes(python3({b"data": attack, b"labels": []}, protocol))
    with pytest.raises(InputError, match=r"data\.train: .*data_batch_3 cannot be read \(it names .*, which no image"):
        read_images(str(path), "data.train", split="train")
    assert not mark.exists()


def test_the_attack_would_work(tmp_path):
    pickle.loads(python3(Attack(eval, f"open({str(tmp_path / 'mark')!r}, 'w').close()")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", b"torn", r"data_batch_2 cannot be read"),
        ("data_batch_2", python2([1]), r"data_batch_2 cannot be read"),
        ("data_batch_2", python2({b"labels": [0, 1]}), r"data_batch_2 has no uint8 images of 32 x 32"),
        ("data_batch_2", python2({b"data": rows(IMAGES[:2])[:, :99], b"labels": [0, 1]}), r"data_batch_2 has no uint8"),
        ("data_batch_2", python2({b"data": rows(IMAGES[:2]), b"labels": [0]}), r"data_batch_2 has 2 images and 1 lab"),
        ("data_batch_2", python2({b"data": rows(IMAGES[:2])}), r"data_batch_2 has 2 images and 0 labels"),
        ("data_batch_2", python2({b"data": rows(IMAGES[:2]), b"labels": [0, 2]}), r"image 1 has the label 2, none of"),
        ("batches.meta", python2({b"label_names": [b"cat", b"dog", b"cow"]}), r"has no image of 'cow'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    path = write_cifar10(tmp_path / "cifar")
    (path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_images(str(path), "data.train", split="train")


def test_missing_files_and_splits_are_named(tmp_path):
    path = write_cifar10(tmp_path / "cifar")
    (path / "data_batch_5").unlink()
    with pytest.raises(InputError, match=r"has no file 'data_batch_5'"):
        read_images(str(path), "data.train", split="train")
    with pytest.raises(InputError, match=r"has no split 'validation'; it has train, test"):
        read_images(str(path), "data.validation", split="validation")


def test_a_torn_archive_is_one_line(tmp_path):
    write_cifar10(tmp_path / "cifar")
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar")
    whole = (tmp_path / "cifar.tar.gz").read_bytes()
    (tmp_path / "cifar.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"data\.train: .*cifar\.tar\.gz cannot be unpacked"):
        read_images(str(tmp_path / "cifar.tar.gz"), "data.train", split="train")


def test_other_folders_and_files_are_no_cifar(tmp_path):
    assert cifar_files.find_cifar(tmp_path, "f") is None
    (tmp_path / "x.npz").write_bytes(b"")
    assert cifar_files.find_cifar(tmp_path / "x.npz", "f") is None
