"""Which labels are kept, and the labelled image that goes with each training image."""

from __future__ import annotations

import pytest
import torch

from ppl_vae.data import add_labelled_images, keep_labels
from ppl_vae.runtime.records import UNKNOWN

LABELS = torch.arange(1000) % 10


def test_as_many_labels_of_each_class_are_kept():
    kept = keep_labels(LABELS, 100, seed=0)
    known = kept != UNKNOWN
    assert (kept[known] == LABELS[known]).all()
    assert kept[known].bincount().tolist() == [10] * 10


def test_a_number_that_classes_do_not_divide_gives_some_of_them_one_more():
    kept = keep_labels(LABELS, 23, seed=0)
    assert kept[kept != UNKNOWN].bincount().tolist() == [3, 3, 3] + [2] * 7


def test_the_seed_decides_which_labels_are_kept():
    first, again, other = (keep_labels(LABELS, 100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("number", "words"),
    [(9, "at least one label for each of 10 classes, got 9"), (1010, "got 101 of class 0, which has 100")],
)
def test_a_number_of_labels_that_classes_do_not_have_is_refused(number, words):
    with pytest.raises(ValueError, match=words):
        keep_labels(LABELS, number, seed=0)


def test_labelled_images_are_taken_equally_often_and_go_with_their_labels():
    stored = torch.arange(1000.0)[:, None] + 0.5
    y = keep_labels(LABELS, 50, seed=0)
    records = add_labelled_images(stored, y, lambda x, generator: 2 * x, seed=3)
    labels, labelled_x, labelled_y = records.further
    places = (labelled_x[:, 0] / 2 - 0.5).long()
    assert torch.equal(records.x, stored)
    assert torch.equal(labels, y)
    assert torch.equal(labelled_y, LABELS[places])
    assert places.bincount(minlength=1000)[y != UNKNOWN].tolist() == [20] * 50
    assert not torch.equal(labelled_y, labelled_y.sort().values)


def test_drawn_labelled_images_are_the_same_for_the_same_seed_and_differ_between_draws():
    stored, y = torch.full((1000, 6), 0.5), keep_labels(LABELS, 10, seed=0)
    draws = [add_labelled_images(stored, y, lambda x, generator: torch.bernoulli(x), seed=1).further[1] for _ in "ab"]
    assert torch.equal(*draws)
    assert draws[0].float().mean(0).sub(0.5).abs().max() < 0.1  # five standard deviations are 0.08
