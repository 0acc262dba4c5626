import numpy as np
import pytest

from abkd import InputError
from abkd.data.labelled_images import (
    LabelledImages,
    base_and_new,
    check_counts,
    check_every_class,
    check_same_classes,
    select_classes,
    split_off,
    take_per_class,
)


def numbered(labels, classes="abc", origin=""):
    """Images of one pixel that holds the image's number."""
    labels = np.asarray(labels, dtype=np.int64)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    return LabelledImages(images, labels, tuple(classes), 1, 2, origin)


def numbers(images):
    return images.images[:, 0, 0, 0].tolist()


UNEVEN = [0, 1, 2] * 10 + [0] * 20 + [2] * 5


def test_a_validation_split_has_as_many_of_each_class():
    train = numbered(UNEVEN)
    rest, held_out = split_off(train, 11, "data.num_held_out")
    assert np.bincount(held_out.labels).tolist() == [4, 4, 3] and len(rest) == len(train) - 11
    assert sorted(numbers(rest) + numbers(held_out)) == numbers(train)
    for part in (rest, held_out):
        assert [UNEVEN[number] for number in numbers(part)] == part.labels.tolist()
        assert (part.classes, part.num_skipped, part.num_grey) == (("a", "b", "c"), 1, 2)


def test_a_validation_split_is_always_the_same_and_not_the_first_images():
    _, once = split_off(numbered(UNEVEN), 11, "f")
    _, again = split_off(numbered(UNEVEN), 11, "f")
    assert numbers(once) == numbers(again) == [2, 4, 10, 11, 22, 26, 28, 32, 33, 40, 45]


def test_a_class_that_would_be_emptied_is_named():
    with pytest.raises(InputError, match=r"data\.num_held_out=30 takes 10 images of each class, and 'b' has 10"):
        split_off(numbered(UNEVEN), 30, "data.num_held_out")


def test_few_labels_are_balanced_nested_and_follow_the_seed():
    train = numbered(UNEVEN)
    three, five = (take_per_class(train, num, seed=1) for num in (3, 5))
    assert np.bincount(three.labels).tolist() == [3, 3, 3] and np.bincount(five.labels).tolist() == [5, 5, 5]
    assert set(numbers(three)) < set(numbers(five))
    assert numbers(three) == numbers(take_per_class(train, 3, seed=1)) != numbers(take_per_class(train, 3, seed=2))


@pytest.mark.parametrize("num", [0, 11])
def test_more_labels_than_there_are_is_refused(num):
    with pytest.raises(InputError, match=rf"num_per_class={num} must be 1 to 10, what 'b'"):
        take_per_class(numbered(UNEVEN), num, seed=0)


@pytest.mark.parametrize(("num", "num_base"), [(100, 50), (101, 51), (1, 1), (2, 1)])
def test_base_classes_are_the_first_half_rounded_up(num, num_base):
    base, new = base_and_new([str(index) for index in range(num)])
    assert (base + new, len(base)) == (tuple(range(num)), num_base)


def test_selected_classes_are_renumbered_in_the_given_order():
    chosen = select_classes(numbered([0, 1, 2, 2, 0, 1]), (2, 0))
    assert (chosen.classes, chosen.labels.tolist(), numbers(chosen)) == (("c", "a"), [1, 0, 0, 1], [0, 2, 3, 4])
    assert chosen.labels.dtype == np.int64


def test_every_class_has_an_image():
    check_every_class(np.array([0, 1]), ("a", "b"), "train", "f")
    with pytest.raises(InputError, match=r"f: train has no image of 'b', 'd'; add some"):
        check_every_class(np.array([0, 2]), ("a", "b", "c", "d"), "train", "f")
    with pytest.raises(InputError, match=r"'0', '1', '2', '3', '4' and 15 more"):
        check_every_class(np.array([20]), [str(index) for index in range(21)], "train", "f")


def test_images_and_labels_are_as_many():
    check_counts(2, 2, "x.npz", "f")
    with pytest.raises(InputError, match=r"f: x\.npz has 2 images and 3 labels"):
        check_counts(2, 3, "x.npz", "f")


def test_train_and_test_have_the_same_classes():
    train = numbered([0, 1, 2], origin="x [train]")
    check_same_classes(train, numbered([0, 1, 2], origin="x [test]"), "f")
    check_same_classes(numbered([0, 1, 2]), numbered([0, 1, 2]), "f")
    with pytest.raises(InputError, match=r"f: it has other .* \(only there: 'a'; only here: 'd'\); give both"):
        check_same_classes(train, numbered([0, 1, 2], "bcd"), "f")
    with pytest.raises(InputError, match=r"\(the same in another order\)"):
        check_same_classes(train, numbered([0, 1, 2], "bac"), "f")


def test_test_images_are_not_those_of_the_training():
    with pytest.raises(InputError, match=r"data\.test: x is what is trained on"):
        check_same_classes(numbered([0, 1, 2], origin="x"), numbered([0, 1, 2], origin="x"), "data.test")
