import itertools

import accelerate
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from PIL import Image
from scipy import stats
from torch.utils.data import BatchSampler, DataLoader

from abkd import InputError
from abkd.data.images import (
    FLIP,
    LEFT,
    TOP,
    Augmentation,
    Draws,
    EpochSampler,
    ImageStore,
    random_boxes,
    repeated,
    resized_crops,
    splitmix64,
)
from abkd.data.labelled_images import LabelledImages

N = 30
PIXELS = np.random.RandomState(0).randint(0, 256, (N, 8, 10, 3), dtype=np.uint8)
LABELS = np.arange(N) % 3
WORD = 2**64


def store():
    return ImageStore(LabelledImages(PIXELS, LABELS, ("a", "b", "c")))


def keys_of(epoch, *indices):
    return torch.tensor([epoch * N + index for index in indices])


class Splitmix64:
    """The generator as published: a state that is added to and mixed, in Python's integers."""

    def __init__(self, state):
        self.state = state % WORD

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) % WORD
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        return z ^ (z >> 31)

    def output(self, number):
        return [self.next() for _ in range(number + 1)][-1]


def slow_bits(seed, epoch, index, number):
    stream = seed
    for step in (epoch, index, number):
        stream = Splitmix64(stream).output(step)
    return stream


def slow_below(seed, epoch, index, number, limit):
    return (slow_bits(seed, epoch, index, number) >> 33) * limit // 2**31


def slow_crop(image, seed, epoch, index, padding, flip):
    padded = np.zeros((image.shape[0] + 2 * padding, image.shape[1] + 2 * padding, 3), dtype=np.uint8)
    padded[padding : padding + image.shape[0], padding : padding + image.shape[1]] = image
    top, left = (slow_below(seed, epoch, index, number, 2 * padding + 1) for number in (2, 3))
    crop = padded[top : top + image.shape[0], left : left + image.shape[1]]
    return crop[:, ::-1] if flip and slow_below(seed, epoch, index, 1, 2) else crop


def test_splitmix64_gives_the_published_numbers():
    """The first outputs of seed 1234567, which implementations in many languages are checked with."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = splitmix64(torch.tensor(1234567), torch.arange(5))
    generator = Splitmix64(1234567)
    assert [value % WORD for value in found.tolist()] == published == [generator.next() for _ in range(5)]


def test_draws_equal_the_slow_hash():
    keys = torch.tensor([0, 1, N - 1, 7 * N + 5, 200 * N + 29])
    for seed, number in itertools.product((0, 1, 2**62, -3), (0, 3, 40)):
        draws = Draws(seed, keys, N)
        places = [(seed, key // N, key % N, number) for key in keys.tolist()]
        assert [bits % WORD for bits in draws.bits(number).tolist()] == [slow_bits(*place) for place in places]
        assert draws.below(number, 9).tolist() == [slow_below(*place, 9) for place in places]
        assert draws.uniform(number).tolist() == [(slow_bits(*place) >> 11) / 2**53 for place in places]


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (2, False), (0, True), (0, False)])
def test_a_batch_is_that_of_the_slow_way(padding, flip):
    augmentation = Augmentation(crop_padding=padding, flip=flip, seed=7)
    for epoch in (0, 3):
        found = store().batch(keys_of(epoch, *range(N)), augmentation)
        slow = [slow_crop(PIXELS[index], 7, epoch, index, padding, flip) for index in range(N)]
        expected = torch.from_numpy(np.stack(slow)).permute(0, 3, 1, 2).float() / 255
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_without_augmentation_a_batch_is_the_images():
    found = store().batch(keys_of(5, 4, 2))
    assert found.dtype == torch.float32 and found.shape == (2, 3, 8, 10)
    assert torch.equal(found, torch.from_numpy(PIXELS[[4, 2]]).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(found, store().batch(keys_of(0, 4, 2)))


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(scale=(0.1, 1.0))])
def test_a_key_alone_decides(augmentation):
    keys = keys_of(2, *range(N))
    whole = store().batch(keys, augmentation)
    order = torch.randperm(N)
    shuffled = torch.cat([store().batch(part, augmentation) for part in keys[order].split(7)])
    assert torch.allclose(shuffled, whole[order], rtol=0, atol=1e-6)
    assert torch.equal(whole, store().batch(keys, augmentation))
    for other in (keys + N, keys - N):
        assert not torch.equal(whole, store().batch(other, augmentation))
    reseeded = Augmentation(scale=augmentation.scale, seed=1)
    assert not torch.equal(whole, store().batch(keys, reseeded))


def is_even(counts, expected=None):
    return stats.chisquare(np.ravel(counts), expected).pvalue > 1e-4


def is_independent(first, second, num):
    return (
        stats.chi2_contingency(np.bincount(first * num + second, minlength=num * num).reshape(num, num)).pvalue > 1e-4
    )


def test_offsets_and_flips_are_uniform_and_independent():
    num = 20_000
    draws = Draws(3, 11 * num + torch.arange(num), num)
    top, left = (draws.below(number, 9).numpy() for number in (TOP, LEFT))
    flip = draws.below(FLIP, 2).numpy()
    assert is_even(np.bincount(top * 9 + left, minlength=81))
    assert is_even(np.bincount((top * 9 + left) * 2 + flip, minlength=162))
    assert stats.kstest(draws.uniform(5).numpy(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(draws.uniform(5), draws.uniform(6))[0, 1]) < 0.03


def test_neighbours_epochs_and_seeds_are_independent():
    num = 20_000
    indices = torch.arange(num)
    top = {
        (seed, epoch): Draws(seed, epoch * num + indices, num).below(TOP, 9).numpy()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    here = top[0, 0]
    for other in (top[0, 1], top[1, 0], top[1, 1], np.roll(here, 1), np.roll(here, 2), np.roll(top[0, 1], 1)):
        assert is_independent(here, other, 9)
    one_image = Draws(0, torch.arange(num) * num, num).below(TOP, 9).numpy()  # over the epochs
    assert is_even(np.bincount(one_image)) and is_independent(one_image, np.roll(one_image, 1), 9)


def slow_box(seed, epoch, index, height, width, scale):
    """As the random resized crop is described, one draw after another."""

    def uniform(number):
        return (slow_bits(seed, epoch, index, number) >> 11) / 2**53

    def below(number, limit):
        return slow_below(seed, epoch, index, number, limit)

    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform(4 + 2 * attempt))
        aspect = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * uniform(5 + 2 * attempt))
        tall, wide = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < tall <= height and 0 < wide <= width:
            return below(2, height - tall + 1), below(3, width - wide + 1), tall, wide
    tall, wide = height, width
    if width / height < 3 / 4:
        tall = round(width / (3 / 4))
    elif width / height > 4 / 3:
        wide = round(height * (4 / 3))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


@pytest.mark.parametrize("size", [(32, 32), (40, 30), (12, 90), (90, 12), (2, 2)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_boxes_are_those_of_the_slow_way(size, scale):
    keys = torch.arange(100, 140)
    found = random_boxes(Draws(5, keys, 25), torch.tensor(size)[:, None], scale)
    assert found.mT.tolist() == [list(slow_box(5, key // 25, key % 25, *size, scale)) for key in keys.tolist()]


def test_boxes_of_images_of_several_sizes():
    sizes = torch.tensor([[32, 40, 12], [32, 30, 90]])
    found = random_boxes(Draws(5, torch.arange(3), 3), sizes, (0.9, 1.0))
    assert found.mT.tolist() == [
        list(slow_box(5, 0, index, *sizes[:, index].tolist(), (0.9, 1.0))) for index in range(3)
    ]


def test_shares_of_the_area_are_uniform():
    """Of shares that always fit, on an image so large that rounding does not show."""
    boxes = random_boxes(Draws(0, torch.arange(5000), 5000), torch.tensor([[4000], [4000]]), (0.1, 0.5))
    share = boxes[2:].double().prod(0) / 4000**2
    assert stats.kstest(share.numpy(), stats.uniform(0.1, 0.4).cdf).pvalue > 1e-4
    log_aspect = (boxes[3] / boxes[2]).log() / np.log(4 / 3)
    assert stats.kstest(log_aspect.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4


def test_resized_crops_are_pillows():
    """In Pillow's mode of floats, which neither rounds nor cuts off between the two directions."""
    image = torch.rand(1, 24, 20)
    boxes = torch.tensor([(0, 0, 24, 20), (3, 2, 12, 9), (20, 15, 4, 5), (7, 7, 1, 1), (0, 5, 23, 2)])
    found = resized_crops(image.expand(5, 1, 24, 20), boxes.mT)
    for result, (top, left, height, width) in zip(found, boxes.tolist(), strict=True):
        crop = Image.fromarray(image[0].numpy()).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((20, 24), Image.Resampling.BICUBIC)).clip(0, 1)
        assert np.abs(result[0].numpy() - expected).max() < 1e-5
    assert torch.allclose(found[0], image, atol=1e-6)


def test_a_resized_crop_is_flipped_like_any_other():
    keys = keys_of(1, *range(N))
    plain = store().batch(keys, Augmentation(scale=(0.3, 1.0), flip=False))
    flipped = store().batch(keys, Augmentation(scale=(0.3, 1.0)))
    for index in range(N):
        is_flipped = slow_below(0, 1, index, 1, 2)
        assert torch.equal(flipped[index], plain[index].flip(-1) if is_flipped else plain[index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_padding": -1}, r"crop_padding=-1 must be 0 or more"),
        ({"scale": (0.0, 1.0)}, r"scale=\(0\.0, 1\.0\) must be"),
        ({"scale": (0.9, 0.5)}, r"scale=\(0\.9, 0\.5\) must be"),
        ({"scale": (0.5, 1.5)}, r"scale=\(0\.5, 1\.5\) must be"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**options)


def test_labels_follow_the_keys():
    images = store().to("cpu")
    assert images.labels_of(keys_of(9, 4, 0, 29)).tolist() == [1, 0, 2]
    assert (len(images), images.classes, images[91]) == (N, ("a", "b", "c"), 91)


def order_of(seed, epoch):
    sampler = EpochSampler(N, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == N
    return list(sampler)


def test_the_keys_of_an_epoch_are_every_image_once_in_its_own_order():
    for epoch in (0, 1, 7):
        assert sorted(order_of(0, epoch)) == list(range(epoch * N, (epoch + 1) * N))
    orders = [tuple(key % N for key in order_of(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4 and order_of(1, 1) == order_of(1, 1)


def test_every_place_is_as_likely():
    places = np.zeros((10, 10))
    sampler = EpochSampler(10, 0)
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        places[np.arange(10), np.array(list(sampler)) - 10 * epoch] += 1
    assert is_even(places)


def test_the_order_says_nothing_of_the_crops():
    num = 20_000
    sampler = EpochSampler(num, 0)
    keys = torch.tensor(list(sampler))
    tops = Draws(0, keys, num).below(TOP, 9).numpy()  # in the order of the epoch
    assert is_even(np.bincount(tops[:2000], minlength=9)) and is_independent(tops[1:], tops[:-1], 9)


def loader(images, seed=0):
    return DataLoader(images, batch_size=4, sampler=EpochSampler(N, seed), collate_fn=torch.tensor)


def test_a_data_loader_goes_through_epochs_and_resumes_within_one():
    """As the Trainer does: `set_epoch` before each, the batches already seen skipped."""
    prepared = prepare_data_loader(loader(store()), num_processes=1, process_index=0, put_on_device=False)
    epochs = []
    for epoch in range(3):
        prepared.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in prepared])
    assert [list(itertools.chain(*epoch)) for epoch in epochs] == [order_of(0, epoch) for epoch in range(3)]
    resumed = prepare_data_loader(loader(store()), num_processes=1, process_index=0, put_on_device=False)
    resumed = accelerate.skip_first_batches(resumed, 3)
    resumed.set_epoch(2)
    assert [batch.tolist() for batch in resumed] == epochs[2][3:]


def test_ranks_share_an_epoch():
    sampler = EpochSampler(N, 0)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, 5, False), 2, rank)) for rank in (0, 1)]
    assert sorted(itertools.chain(*shards[0], *shards[1])) == list(range(N))


@pytest.mark.parametrize(
    "options, period",
    [
        ({}, 0),
        ({"repeat_every": 3}, 3),
        ({"crop_padding": 0, "flip": False}, 1),
        ({"crop_padding": 0, "flip": False, "repeat_every": 3}, 1),
        ({"crop_padding": 0, "flip": False, "scale": (0.5, 1.0)}, 0),
    ],
)
def test_images_come_again_after_a_period(options, period):
    augmentation = Augmentation(**options)
    assert augmentation.period == period
    keys = torch.arange(0, 60, 7)
    first = repeated(keys, augmentation, num_images=10)
    assert torch.equal(first, keys if period == 0 else keys % (10 * period))
    assert torch.equal(repeated(keys, None, num_images=10), keys % 10)
    with pytest.raises(InputError, match="repeat_every=-1"):
        Augmentation(repeat_every=-1)
