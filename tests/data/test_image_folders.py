import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from abkd import InputError
from abkd.data.image_files import read_images
from abkd.data.image_folders import FolderStore
from abkd.data.images import Augmentation, Draws, ImageStore, random_boxes

SIZES = [(40, 60), (60, 40), (24, 24), (33, 47), (100, 26)]


@pytest.fixture
def folder(tmp_path):
    """Five images of five sizes, smooth, of two classes."""
    random = np.random.RandomState(0)
    for number, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(random.randint(0, 256, (5, 5, 3), dtype=np.uint8))
        place = tmp_path / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    return tmp_path


def in_memory(folder, size=16):
    return ImageStore(read_images(str(folder), "data.train", split="train", size=size))


def lazily(folder, size=16, **options):
    return FolderStore.read(str(folder), "data.train", split="train", size=size, **options)


KEYS = torch.tensor([5 + 3, 10 + 4, 0, 25 + 1, 5 + 3])


@pytest.mark.parametrize("augmentation", [None, Augmentation(), Augmentation(crop_padding=0), Augmentation(flip=False)])
def test_files_give_what_the_memory_gives(folder, augmentation):
    found = lazily(folder).batch(KEYS, augmentation)
    assert found.dtype == torch.float32 and torch.equal(found, in_memory(folder).batch(KEYS, augmentation))


def test_labels_and_classes_are_those_of_the_memory(folder):
    files, memory = lazily(folder).to("cpu"), in_memory(folder)
    assert torch.equal(files.labels, memory.labels) and files.classes == memory.classes == ("a", "b")
    assert torch.equal(files.labels_of(KEYS), memory.labels_of(KEYS)) and (len(files), files[7]) == (5, 7)


def test_a_resized_crop_is_taken_out_of_the_whole_image(folder):
    augmentation = Augmentation(scale=(0.2, 0.9), flip=False, seed=3)
    store = lazily(folder, size=20)
    found = store.batch(KEYS, augmentation)
    assert found.shape == (5, 3, 20, 20) and torch.equal(found[0], found[4])
    for place, key in enumerate(KEYS.tolist()):
        image = Image.open(store.files[key % 5])
        draws = Draws(3, torch.tensor([key]), 5)
        (box,) = random_boxes(draws, torch.tensor(image.size[::-1])[:, None], (0.2, 0.9)).mT.tolist()
        top, left, height, width = box
        crop = image.crop((left, top, left + width, top + height)).resize((20, 20), Image.Resampling.BICUBIC)
        assert torch.equal(found[place], torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255)


def test_a_resized_crop_is_flipped_as_in_memory(folder):
    plain, flipped = (lazily(folder).batch(KEYS, Augmentation(scale=(0.2, 0.9), flip=flip)) for flip in (False, True))
    is_flipped = [not torch.equal(flipped[place], plain[place]) for place in range(5)]
    memory = [in_memory(folder).batch(KEYS, Augmentation(crop_padding=0, flip=flip)) for flip in (False, True)]
    assert is_flipped == [not torch.equal(memory[1][place], memory[0][place]) for place in range(5)]
    assert any(is_flipped) and torch.equal(flipped[is_flipped], plain[is_flipped].flip(-1))


def test_an_image_that_is_turned_by_its_camera_is_cropped_as_it_stands(folder):
    exif = Image.Exif()
    exif[274] = 6
    upright = np.zeros((60, 20, 3), dtype=np.uint8)
    upright[30:] = 255  # turned the other way round, black and white would be side by side
    file = folder / "train" / "a" / "0.png"
    Image.fromarray(np.rot90(upright).copy()).save(file, exif=exif)
    found = lazily(folder).batch(torch.tensor([0]), Augmentation(scale=(1.0, 1.0), flip=False))
    assert (found[0].std(dim=2) < 0.01).all() and found[0, 0, 0, 0] < 0.1 and found[0, 0, -1, 0] > 0.9


def test_the_number_of_threads_changes_nothing(folder, monkeypatch):
    import abkd.data.image_folders

    asked = []
    pool = abkd.data.image_folders.ThreadPoolExecutor
    monkeypatch.setattr(
        abkd.data.image_folders, "ThreadPoolExecutor", lambda num: asked.append(num) or pool(max_workers=num)
    )
    one, three = (lazily(folder, num_threads=num).batch(KEYS, Augmentation()) for num in (1, 3))
    assert torch.equal(one, three) and asked == [1, 3]


def test_a_worker_process_may_be_handed_the_store(folder):
    store = lazily(folder)
    store.batch(KEYS)
    assert torch.equal(pickle.loads(pickle.dumps(store)).batch(KEYS), store.batch(KEYS))


@pytest.mark.parametrize("augmentation", [None, Augmentation(scale=(0.5, 1.0))])
def test_a_torn_file_is_named(folder, augmentation):
    store = lazily(folder)
    file = folder / "train" / "a" / "2.png"
    file.write_bytes(b"torn")
    with pytest.raises(InputError, match=rf"{file} cannot be read \(cannot identify .*\); mend it"):
        store.batch(torch.arange(5), augmentation)
