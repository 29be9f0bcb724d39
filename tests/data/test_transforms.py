"""Data: how the model sees stored images (binarized, levels, dequantized, unchanged), protocols, entropy, subsets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import bernoulli

from ppl_vae import data
from ppl_vae.data import storage, transforms

RNG = np.random.default_rng(0)
SPLITS = ("train", "validation", "test")
BINARIZATIONS = ("dynamic", "fixed", "threshold", "none")


def build(values: np.ndarray, kind: str) -> data.Splits:
    """Splits of a half, a quarter and a quarter of the images."""
    x = torch.from_numpy(values)
    half, quarter = len(x) // 2, len(x) // 4
    parts = x[:half], x[half : half + quarter], x[half + quarter :]
    return data.Splits("own", kind, *parts, sha256="", split="")


STORED = {
    data.BINARY: RNG.integers(0, 2, (40, 6), np.uint8),
    data.LEVELS: RNG.integers(0, 256, (40, 6), np.uint8),
    data.PROBABILITIES: RNG.random((40, 6), dtype=np.float32),
    data.REAL: RNG.normal(size=(40, 6)).astype(np.float32),
    data.COUNTS: RNG.poisson(3.0, (40, 6)).astype(np.float32),
}


@pytest.fixture(scope="module")
def mnist() -> data.Splits:
    return data.load("mnist")


@pytest.fixture(scope="module")
def iwae() -> data.Splits:
    return data.load("mnist", protocol="iwae")


@pytest.fixture
def gray() -> data.Splits:
    """90 images with random levels."""
    levels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (90, 1, 5, 6), np.uint8))
    return data.Splits("gray", data.LEVELS, levels[:50], levels[50:70], levels[70:], sha256="", split="")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results lie in files, and images are transformed a few at a time."""
    monkeypatch.setattr(storage, "fits_in_memory", lambda num_bytes: num_bytes <= 100)
    monkeypatch.setattr(transforms, "_MOST_PIXELS", 150)


# --- Images of an evaluation ---


@pytest.mark.thorough
@pytest.mark.parametrize("binarization", ["dynamic", "fixed"])
def test_mnist_is_evaluated_on_the_published_draw(mnist, binarization):
    """The protocol as its authors' code has it: seed 777, one binomial draw over validation, then one over test."""
    before = np.random.get_state()  # noqa: NPY002 (the published generator is numpy's global one)
    try:
        np.random.seed(777)  # noqa: NPY002
        for split in ("validation", "test"):
            rates = getattr(mnist, split).numpy().astype(np.float32) / 255
            expected = np.random.binomial(1, rates)  # noqa: NPY002
            np.testing.assert_array_equal(data.evaluation_images(mnist, split, binarization).numpy(), expected)
    finally:
        np.random.set_state(before)  # noqa: NPY002


def compute_expected(splits: data.Splits, split: str, word: str) -> np.ndarray:
    """Each word in one call of the published generators, by numpy and torch."""
    stored = {name: getattr(splits, name).numpy() for name in SPLITS}
    rate = {name: levels.astype(np.float32) / np.float32(255) for name, levels in stored.items()}
    if word in ("dynamic", "fixed"):
        stream = np.random.RandomState(777)
        drawn = {name: stream.binomial(1, rate[name]) for name in ("validation", "test", "train")}
        return drawn[split].astype(np.float32)
    if word == "dequantized":
        generator = torch.Generator().manual_seed(777 + ("test", "validation", "train").index(split))
        u = torch.rand(stored[split].shape, generator=generator).numpy()
        return (stored[split].astype(np.float32) + u) / np.float32(256)
    values = {"threshold": stored[split] >= 128, "none": rate[split], "levels": stored[split]}
    return values[word].astype(np.float32)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("word", data.PIXELS)
def test_images_of_each_word_are_the_same_whole_and_in_parts(gray, word, split, size, request):
    if size == "large":
        request.getfixturevalue("large")
    x = data.evaluation_images(gray, split, word)
    np.testing.assert_array_equal(x.numpy(), compute_expected(gray, split, word), strict=True)
    assert data.is_mapped(x) == (size == "large")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("word", ["fixed", "threshold"])
def test_a_stored_draw_is_the_same_in_parts_and_takes_a_byte_per_pixel(gray, word):
    stored, transform = data.training_images(gray, word)
    assert stored.dtype == torch.uint8
    assert data.is_mapped(stored)
    np.testing.assert_array_equal(transform(stored).numpy(), compute_expected(gray, "train", word))


@pytest.mark.parametrize("word", data.PIXELS)
def test_images_neither_depend_on_global_generators_nor_change_them(gray, word):
    np.random.seed(1)  # noqa: NPY002 (the global generators are what must not matter)
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, subset = data.evaluation_images(gray, "test", word), data.subset(10_000, 100)
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(first, data.evaluation_images(gray, "test", word, seed=3))
    assert torch.equal(subset, data.subset(10_000, 100))


@pytest.mark.parametrize("word", ["levels", "dequantized"])
def test_only_8_bit_data_has_levels(word):
    with pytest.raises(ValueError, match=rf"pixels: expected 8-bit levels for '{word}', got real values"):
        data.evaluation_images(build(STORED[data.REAL], data.REAL), "test", word)


# --- Draws ---


def test_each_level_is_drawn_at_its_own_rate():
    num_draws = 20_000
    levels = torch.arange(256, dtype=torch.uint8).expand(num_draws, 256)
    rate = levels[0].double() / 255
    drawn = data.sample_bernoulli(levels, torch.Generator().manual_seed(0)).double().mean(0)
    stderr = (rate * (1 - rate) / num_draws).sqrt()
    gray_only = slice(1, 255)
    in_standard_errors = ((drawn - rate)[gray_only] / stderr[gray_only]).abs()
    assert in_standard_errors.max() < 4.5
    assert in_standard_errors.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / 254))


def test_each_probability_is_drawn_at_its_own_rate():
    num_draws, rate = 40_000, torch.tensor([0.01, 0.1, 0.5, 0.77, 0.999])
    drawn = data.sample_bernoulli(rate.expand(num_draws, 5), torch.Generator().manual_seed(1)).double().mean(0)
    stderr = (rate * (1 - rate) / num_draws).sqrt()
    assert ((drawn - rate) / stderr).abs().max() < 4


# torch.rand gives multiples of 2^-24 from 0 on, and never 1.
@pytest.mark.parametrize(("uniform", "level"), [(0.0, 0), (1 - 2.0**-24, 255)], ids=["black at 0", "white at almost 1"])
def test_black_and_white_are_certain_at_the_ends_of_the_uniform_numbers(monkeypatch, uniform, level):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform))
    stored = torch.full((1,), level, dtype=torch.uint8)
    assert data.sample_bernoulli(stored, torch.Generator()) == stored / 255
    assert data.sample_bernoulli(stored / 255, torch.Generator()) == stored / 255


# --- Training images ---


@pytest.mark.parametrize("word", ["dynamic", "dequantized"])
def test_training_images_are_drawn_anew_at_each_access_from_their_generator_alone(gray, word):
    stored, transform = data.training_images(gray, word)
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(1)
    first, second = transform(stored, generator), transform(stored, generator)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert torch.equal(first, transform(stored, torch.Generator().manual_seed(7)))
    if word == "dynamic":
        assert set(first.unique().tolist()) == {0.0, 1.0}
    else:
        assert torch.equal((256 * first).floor(), gray.train.float())


def test_a_dynamic_draw_is_the_expected_image_on_average():
    splits = build(STORED[data.LEVELS], data.LEVELS)
    stored, transform = data.training_images(splits, "dynamic")
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([transform(stored, generator) for _ in range(2000)]).mean(0)
    expected = data.expected_images(splits, "dynamic")
    error = (expected * (1 - expected) / 2000).sqrt()
    assert ((mean - expected).abs() <= 5 * error + 1e-6).all()


def test_gray_data_takes_each_binarization_and_resolves_to_the_default(gray):
    assert data.resolve_binarization(gray, None) == "dynamic"
    assert data.resolve_binarization(gray, None, default="threshold") == "threshold"
    assert [data.resolve_binarization(gray, word) for word in BINARIZATIONS] == [*BINARIZATIONS]


# --- The entropy of a draw ---


@pytest.mark.parametrize("kind", [data.LEVELS, data.PROBABILITIES])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("binarization", ["dynamic", "fixed"])
def test_the_entropy_of_a_draw_is_that_of_its_bernoullis(kind, split, binarization):
    splits = build(STORED[kind], kind)
    entropy = data.binarization_entropy(splits, split, binarization)
    rates = getattr(splits, split).double().numpy() / (255 if kind == data.LEVELS else 1)
    assert entropy is not None
    np.testing.assert_allclose(entropy.numpy(), bernoulli.entropy(rates).sum(axis=1), rtol=1e-12)


def test_the_entropy_of_mnists_test_set_is_45_53_nats(mnist):
    entropy = data.binarization_entropy(mnist, "test", "dynamic")
    assert entropy is not None
    assert (tuple(entropy.shape), entropy.dtype) == ((10_000,), torch.float64)
    assert entropy.mean().item() == pytest.approx(45.53, abs=0.005)


# --- The protocol of Burda et al. (2015) ---


@pytest.mark.thorough
def test_under_iwae_all_training_images_and_labels_train(iwae, mnist):
    assert torch.equal(iwae.train, torch.cat([mnist.train, mnist.validation]))
    assert torch.equal(iwae.labels["train"], torch.cat([mnist.labels["train"], mnist.labels["validation"]]))
    assert "60,000 / 0 / 10,000 (iwae protocol: all training images train, and test is drawn anew" in iwae.describe()
    assert tuple(iwae.validation.shape) == (0, 1, 28, 28)
    with pytest.raises(ValueError, match="mnist: has no validation images under the iwae protocol"):
        data.evaluation_images(iwae, "validation", "dynamic")


def test_under_iwae_a_dynamic_test_set_is_drawn_from_the_seed_and_a_fixed_one_is_not(gray, request):
    splits = replace(gray, protocol="iwae")
    rate = gray.test.numpy().astype(np.float32) / np.float32(255)
    expected = np.random.RandomState(5).binomial(1, rate)
    np.testing.assert_array_equal(data.evaluation_images(splits, "test", "dynamic", seed=5).numpy(), expected)
    first, second = (data.evaluation_images(splits, "test", "fixed", seed=seed) for seed in (0, 1))
    assert torch.equal(first, second)
    request.getfixturevalue("large")
    np.testing.assert_array_equal(data.evaluation_images(splits, "test", "dynamic", seed=5).numpy(), expected)


@pytest.mark.parametrize("dataset", ["static-mnist", "caltech-silhouettes", "cifar10", "svhn", "own.npz"])
def test_the_iwae_protocol_is_for_the_gray_sets_alone(dataset):
    with pytest.raises(ValueError, match=rf"protocol: expected vampprior for {dataset} \(iwae is for mnist, fashion"):
        data.load(dataset, protocol="iwae")


# --- Subsets ---


@pytest.mark.parametrize(("num_images", "most"), [(10_000, 20), (10_000, 5_000), (50, 49), (3, 1)])
def test_a_subset_is_ascending_and_has_the_size_that_was_asked_for(num_images, most):
    index = data.subset(num_images, most)
    assert len(index) == most
    assert (index.diff() > 0).all()
    assert index[0] >= 0
    assert index[-1] < num_images


@pytest.mark.parametrize("most", [10, 100, 1_000])
def test_a_subset_is_not_the_first_images(most):
    """Image i of a random subset of n among N lies near i N / n: the mean index is (N - 1) / 2, within its error."""
    num_images = 10_000
    index = data.subset(num_images, most).double()
    stderr = math.sqrt((num_images**2 - 1) / 12 / most)
    assert (index.mean() - (num_images - 1) / 2).abs() < 4 * stderr
