"""Data: the embedded MNIST, a person's own files, splits, binarization, subsets."""

from __future__ import annotations

import hashlib
import io
import lzma
import math
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import bernoulli

from ppl_vae import data

PIXELS = np.random.default_rng(0)


def raw_mnist(name: str) -> bytes:
    return lzma.decompress((files("ppl_vae") / "mnist" / f"{name}.xz").read_bytes())


def own(path: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> data.Splits:
    """What the package reads from a file of these arrays."""
    if array is not None:
        path = path / "own.npy"
        np.save(path, array)
    else:
        path = path / "own.npz"
        np.savez(path, **arrays)
    return data.load(str(path))


@pytest.fixture(scope="module")
def mnist() -> data.Splits:
    return data.load("mnist")


@pytest.fixture(scope="module")
def idx() -> SimpleNamespace:
    """MNIST's images by a second reading of the IDX format: 16 bytes of header, then the pixels in row order."""
    pixels = {
        name: np.frombuffer(raw_mnist(f"{name}-images-idx3-ubyte"), np.uint8)[16:].reshape(-1, 1, 28, 28)
        for name in ("train", "t10k")
    }
    return SimpleNamespace(train=pixels["train"], test=pixels["t10k"])


@pytest.fixture
def gray() -> data.Splits:
    """Small and gray, with every level present."""
    levels = torch.arange(256, dtype=torch.uint8)
    images = torch.stack([levels.roll(i).reshape(1, 16, 16) for i in range(40)])
    return data.Splits("gray", data.LEVELS, images[:20], images[20:30], images[30:], sha256="", split="")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# --- Binarization ---


@pytest.mark.parametrize("binarization", ["dynamic", "fixed"])
def test_mnist_is_evaluated_on_the_published_draw(mnist: data.Splits, idx: SimpleNamespace, binarization: str) -> None:
    """The protocol as its authors' code has it: seed 777, one binomial draw over validation, then one over test."""
    before = np.random.get_state()  # noqa: NPY002 (the published generator is numpy's global one)
    try:
        np.random.seed(777)  # noqa: NPY002
        validation = np.random.binomial(1, idx.train[50_000:].astype(np.float32) / 255)  # noqa: NPY002
        test = np.random.binomial(1, idx.test.astype(np.float32) / 255)  # noqa: NPY002
    finally:
        np.random.set_state(before)  # noqa: NPY002
    np.testing.assert_array_equal(data.evaluation_images(mnist, "validation", binarization).numpy(), validation)
    np.testing.assert_array_equal(data.evaluation_images(mnist, "test", binarization).numpy(), test)


def test_a_fixed_training_set_is_the_third_draw_of_the_published_stream(gray: data.Splits) -> None:
    stream = np.random.RandomState(777)
    validation, test, train = (
        stream.binomial(1, x.numpy().astype(np.float32) / 255) for x in (gray.validation, gray.test, gray.train)
    )
    stored, observe = data.training_images(gray, "fixed")
    np.testing.assert_array_equal(observe(stored, torch.Generator()).numpy(), train)
    assert validation.shape[0] == len(gray.validation)
    assert test.shape[0] == len(gray.test)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("binarization", ["dynamic", "fixed", "threshold", "none"])
def test_evaluated_images_do_not_depend_on_global_seeds(gray: data.Splits, split: str, binarization: str) -> None:
    np.random.seed(1)  # noqa: NPY002 (the global generator is what must not matter)
    torch.manual_seed(1)
    first = data.evaluation_images(gray, split, binarization)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(first, data.evaluation_images(gray, split, binarization))


@pytest.mark.parametrize("binarization", ["dynamic", "fixed"])
def test_evaluated_images_leave_global_generators_alone(gray: data.Splits, binarization: str) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data.evaluation_images(gray, "test", binarization)
    assert torch.equal(torch_before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("split", ["valid", "all", ""])
def test_an_unknown_split_is_refused(gray: data.Splits, split: str) -> None:
    with pytest.raises(ValueError, match="split: expected one of test, validation, train"):
        data.evaluation_images(gray, split, "dynamic")


def test_each_level_is_drawn_at_its_own_rate() -> None:
    num_draws = 20_000
    levels = torch.arange(256, dtype=torch.uint8).expand(num_draws, 256)
    rate = levels[0].double() / 255
    drawn = data.sample_bernoulli(levels, torch.Generator().manual_seed(0)).double().mean(0)
    stderr = (rate * (1 - rate) / num_draws).sqrt()
    grey_only = slice(1, 255)
    in_standard_errors = ((drawn - rate)[grey_only] / stderr[grey_only]).abs()
    assert in_standard_errors.max() < 4.5
    assert in_standard_errors.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / 254))


def test_each_probability_is_drawn_at_its_own_rate() -> None:
    num_draws, rate = 40_000, torch.tensor([0.01, 0.1, 0.5, 0.77, 0.999])
    drawn = data.sample_bernoulli(rate.expand(num_draws, 5), torch.Generator().manual_seed(1)).double().mean(0)
    stderr = (rate * (1 - rate) / num_draws).sqrt()
    assert ((drawn - rate) / stderr).abs().max() < 4


@pytest.mark.parametrize("black", [torch.tensor(0, dtype=torch.uint8), torch.tensor(0.0)])
def test_black_is_never_drawn_white(black: torch.Tensor) -> None:
    assert data.sample_bernoulli(black.expand(1_000_000), torch.Generator().manual_seed(2)).sum() == 0


@pytest.mark.parametrize("white", [torch.tensor(255, dtype=torch.uint8), torch.tensor(1.0)])
def test_white_is_always_drawn_white(white: torch.Tensor) -> None:
    assert data.sample_bernoulli(white.expand(1_000_000), torch.Generator().manual_seed(3)).mean() == 1


# torch.rand gives multiples of 2^-24 from 0 on, and never 1.
@pytest.mark.parametrize(("uniform", "level"), [(0.0, 0), (1 - 2.0**-24, 255)], ids=["black at 0", "white at almost 1"])
def test_black_and_white_are_certain_at_the_ends_of_the_uniform_numbers(
    monkeypatch: pytest.MonkeyPatch, uniform: float, level: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform))
    stored = torch.full((1,), level, dtype=torch.uint8)
    assert data.sample_bernoulli(stored, torch.Generator()) == stored / 255
    assert data.sample_bernoulli(stored / 255, torch.Generator()) == stored / 255


def test_training_images_are_drawn_anew_at_each_access(gray: data.Splits) -> None:
    stored, observe = data.training_images(gray, "dynamic")
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(observe(stored, generator), observe(stored, generator))


def test_a_training_draw_is_zeros_and_ones_in_float32(gray: data.Splits) -> None:
    stored, observe = data.training_images(gray, "dynamic")
    drawn = observe(stored, torch.Generator().manual_seed(0))
    assert (drawn.dtype, set(drawn.unique().tolist())) == (torch.float32, {0.0, 1.0})


def test_a_training_draw_comes_from_its_generator_alone(gray: data.Splits) -> None:
    stored, observe = data.training_images(gray, "dynamic")
    torch.manual_seed(1)
    first = observe(stored, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    assert torch.equal(first, observe(stored, torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("binarization", ["fixed", "threshold", "none"])
def test_other_training_images_are_the_same_at_each_access(gray: data.Splits, binarization: str) -> None:
    stored, observe = data.training_images(gray, binarization)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(observe(stored, generator), observe(stored, generator))


@pytest.mark.parametrize("binarization", ["fixed", "threshold"])
def test_fixed_training_images_are_those_that_an_evaluation_of_train_sees(gray: data.Splits, binarization: str) -> None:
    stored, observe = data.training_images(gray, binarization)
    assert torch.equal(observe(stored, torch.Generator()), data.evaluation_images(gray, "train", binarization))


def test_threshold_is_white_from_level_128(gray: data.Splits) -> None:
    expected = (gray.test.int() >= 128).float()  # 127/255 is below a half, 128/255 above
    assert torch.equal(data.evaluation_images(gray, "test", "threshold"), expected)


def test_without_binarization_levels_become_fractions(gray: data.Splits) -> None:
    expected = gray.test.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.evaluation_images(gray, "test", "none").numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_binary_data_is_taken_as_it_is(tmp_path: Path, split: str) -> None:
    splits = own(tmp_path, PIXELS.integers(0, 2, (50, 6)).astype(np.uint8))
    assert torch.equal(data.evaluation_images(splits, split, "none"), getattr(splits, split).float())


def test_binary_training_images_are_taken_as_they_are(tmp_path: Path) -> None:
    splits = own(tmp_path, PIXELS.integers(0, 2, (50, 6)).astype(np.uint8))
    stored, observe = data.training_images(splits, "none")
    assert torch.equal(observe(stored, torch.Generator()), splits.train.float())


@pytest.mark.parametrize("binarization", ["dynamic", "fixed", "threshold"])
def test_a_binarization_of_binary_data_is_refused(tmp_path: Path, binarization: str) -> None:
    splits = own(tmp_path, PIXELS.integers(0, 2, (50, 6)).astype(np.uint8))
    with pytest.raises(ValueError, match=f"binarization: expected none for binary data .*, got {binarization}"):
        data.resolve_binarization(splits, binarization)


@pytest.mark.parametrize("binarization", ["dynamic", "fixed"])
def test_a_draw_from_binary_data_is_that_data(tmp_path: Path, binarization: str) -> None:
    """Stored ones are ones, not the level 1 of 255."""
    splits = own(tmp_path, np.ones((50, 6), np.uint8))
    stored, observe = data.training_images(splits, binarization)
    assert observe(stored, torch.Generator().manual_seed(0)).mean() == 1
    assert data.evaluation_images(splits, "test", binarization).mean() == 1


def test_binary_data_resolves_to_no_binarization(tmp_path: Path) -> None:
    splits = own(tmp_path, PIXELS.integers(0, 2, (50, 6)).astype(np.uint8))
    assert data.resolve_binarization(splits, None) == "none"


def test_grey_data_resolves_to_a_dynamic_binarization(gray: data.Splits) -> None:
    assert data.resolve_binarization(gray, None) == "dynamic"


@pytest.mark.parametrize("binarization", ["dynamic", "fixed", "threshold", "none"])
def test_grey_data_takes_each_binarization(gray: data.Splits, binarization: str) -> None:
    assert data.resolve_binarization(gray, binarization) == binarization


# --- A person's own file: layouts and kinds ---

LAYOUTS = {  # stored event shape -> E
    (12,): (12,),
    (3, 4): (1, 3, 4),
    (3, 4, 1): (1, 3, 4),
    (3, 4, 3): (3, 3, 4),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_layout_becomes_channels_first(tmp_path: Path, layout: tuple[int, ...], suffix: str) -> None:
    """The pixel at (row, column, channel) of the file is at (channel, row, column) of the tensor."""
    stored = PIXELS.integers(0, 256, (20, *layout)).astype(np.uint8)
    read = own(tmp_path, stored) if suffix == ".npy" else own(tmp_path, train=stored, valid=stored, test=stored)
    image = {tuple(x.flatten().tolist()) for x in read.train}
    expected = set()
    for one in stored:
        pixels = one.reshape(1, -1) if one.ndim == 1 else one.reshape(*one.shape[:2], -1)
        channels = [pixels] if one.ndim == 1 else [pixels[:, :, c] for c in range(pixels.shape[2])]
        expected.add(tuple(np.concatenate([channel.flatten() for channel in channels]).tolist()))
    assert read.event_shape == LAYOUTS[layout]
    assert image <= expected


def test_a_red_image_is_red(tmp_path: Path) -> None:
    red = np.zeros((20, 4, 5, 3), np.uint8)
    red[..., 0] = 200
    read = own(tmp_path, red)
    assert [int(read.train[:, channel].float().mean()) for channel in range(3)] == [200, 0, 0]


KINDS = {
    "bool": (np.array([[False, True]] * 20), "binary", torch.uint8),
    "uint8 zeros and ones": (np.array([[0, 1]] * 20, np.uint8), "binary", torch.uint8),
    "int64 zeros and ones": (np.array([[0, 1]] * 20, np.int64), "binary", torch.uint8),
    "float64 zeros and ones": (np.array([[0.0, 1.0]] * 20), "binary", torch.uint8),
    "uint8 levels": (np.array([[0, 255]] * 20, np.uint8), "8-bit levels", torch.uint8),
    "int64 counts": (np.array([[0, 7]] * 20, np.int64), "counts", torch.float32),
    "uint16 counts": (np.array([[0, 300]] * 20, np.uint16), "counts", torch.float32),
    "float16 probabilities": (np.array([[0.25, 1.0]] * 20, np.float16), "probabilities", torch.float32),
    "float32 probabilities": (np.array([[0.25, 1.0]] * 20, np.float32), "probabilities", torch.float32),
    "float64 probabilities": (np.array([[0.25, 1.0]] * 20, np.float64), "probabilities", torch.float32),
    "big-endian probabilities": (np.array([[0.25, 1.0]] * 20, ">f4"), "probabilities", torch.float32),
    "negative floats": (np.array([[-0.5, 1.0]] * 20), "real values", torch.float32),
    "floats above 1": (np.array([[0.0, 1.5]] * 20, np.float16), "real values", torch.float32),
    "whole floats from 0": (np.array([[0.0, 255.0]] * 20, np.float32), "counts", torch.float32),
    "whole floats below 0": (np.array([[-3.0, 255.0]] * 20, np.float32), "real values", torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_recognized(tmp_path: Path, kind: str) -> None:
    stored, word, dtype = KINDS[kind]
    read = own(tmp_path, stored)
    assert (read.kind, read.train.dtype) == (word, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_its_values(tmp_path: Path, kind: str) -> None:
    stored, _, _ = KINDS[kind]
    read = own(tmp_path, stored)
    np.testing.assert_array_equal(read.train[0].numpy().astype(np.float64), stored[0].astype(np.float64))


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    read = own(tmp_path, PIXELS.random((20, 3)))
    assert read.sha256 == hashlib.sha256((tmp_path / "own.npy").read_bytes()).hexdigest()


def test_a_description_says_kind_shape_sizes_and_split(tmp_path: Path) -> None:
    gray = PIXELS.integers(0, 256, (20, 4, 5, 3)).astype(np.uint8)
    read = own(tmp_path, train=gray, valid=gray[:7], test=gray[:9])
    assert read.describe() == (
        "own.npz: 8-bit levels from 0 to 255, 3x4x5; train / validation / test 20 / 7 / 9 (as the file gives them)"
    )


# --- Splits of a person's own file ---


def numbered(start: int, stop: int) -> np.ndarray:
    """(N, 1) images that can be told apart: image i is the probability (i + 1) / 1024, exact in float32."""
    return (np.arange(start, stop)[:, None] + 1) / 1024


def numbers(images: torch.Tensor) -> list[int]:
    return [round(value * 1024) - 1 for value in images.flatten().tolist()]


@pytest.mark.parametrize("key", ["valid", "validation", "val"])
def test_each_key_of_a_file_is_its_split(tmp_path: Path, key: str) -> None:
    read = own(tmp_path, **{"test": numbered(50, 60), key: numbered(40, 50), "train": numbered(0, 40)})
    assert numbers(read.train) == list(range(40))
    assert numbers(read.validation) == list(range(40, 50))
    assert numbers(read.test) == list(range(50, 60))


@pytest.mark.parametrize("name", ["arr_0", "images", "train"])
def test_a_single_array_of_any_name_is_split_80_10_10(tmp_path: Path, name: str) -> None:
    read = own(tmp_path, **{name: numbered(0, 200)})
    assert [len(x) for x in (read.train, read.validation, read.test)] == [160, 20, 20]


@pytest.mark.parametrize("count", [10, 19, 200])
def test_missing_splits_are_disjoint_and_cover_the_file(tmp_path: Path, count: int) -> None:
    read = own(tmp_path, numbered(0, count))
    seen = [*numbers(read.train), *numbers(read.validation), *numbers(read.test)]
    assert sorted(seen) == list(range(count))


def test_missing_splits_are_the_same_at_every_load(tmp_path: Path) -> None:
    np.random.seed(1)  # noqa: NPY002 (the global generator is what must not matter)
    first = own(tmp_path, numbered(0, 200))
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(first.test, data.load(str(tmp_path / "own.npy")).test)


def test_missing_splits_of_a_sorted_file_hold_every_class(tmp_path: Path) -> None:
    read = own(tmp_path, numbered(0, 1000))
    for split in (read.validation, read.test):
        assert {number // 100 for number in numbers(split)} == set(range(10))


@pytest.mark.parametrize(("given", "missing"), [("test", "validation"), ("valid", "test")])
def test_a_split_that_the_file_has_is_kept_and_the_other_is_taken_from_train(
    tmp_path: Path, given: str, missing: str
) -> None:
    read = own(tmp_path, **{"train": numbered(0, 100), given: numbered(100, 130)})
    kept = read.test if given == "test" else read.validation
    assert numbers(kept) == list(range(100, 130))
    assert sorted([*numbers(read.train), *numbers(getattr(read, missing))]) == list(range(100))
    assert len(getattr(read, missing)) == 10


def test_a_description_names_the_splits_that_were_made(tmp_path: Path) -> None:
    assert "validation and test: a tenth of the images each" in own(tmp_path, numbered(0, 100)).describe()


def test_a_description_names_the_arrays_that_were_ignored(tmp_path: Path) -> None:
    read = own(tmp_path, train=numbered(0, 100), valid_labels=np.arange(100), notes=np.arange(3))
    assert "other arrays ignored: valid_labels, notes" in read.describe()


# --- Files that are refused ---

GREY = PIXELS.integers(0, 256, (20, 4, 5)).astype(np.uint8)
BITS = PIXELS.integers(0, 2, (20, 4, 5)).astype(np.uint8)
FLOATS = PIXELS.random((20, 4, 5))


def saved(name: str, **arrays: np.ndarray) -> bytes:
    """The bytes of an .npy file (one array, called array) or an .npz file."""
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, arrays["array"])
    else:
        np.savez(buffer, **arrays)
    return buffer.getvalue()


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed[3, 2, 1] = value
    return changed


def objects(name: str) -> bytes:
    array = np.array([{"pixels": 1}] * 20, dtype=object)
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, array, allow_pickle=True)
    else:
        np.savez(buffer, train=array)
    return buffer.getvalue()


BAD_FILES = {
    "an empty file": ("own.npy", b"", "own.npy: not a readable array file"),
    "an empty archive file": ("own.npz", b"", "own.npz: not a readable array file"),
    "a truncated npz": ("own.npz", saved("own.npz", train=GREY)[:-60], "own.npz: not a readable array file"),
    "half an npz": ("own.npz", saved("own.npz", train=GREY)[:200], "own.npz: not a readable array file"),
    "an npz with a flipped byte": (
        "own.npz",
        flipped(saved("own.npz", train=GREY), 300),
        "own.npz: not a readable array file",
    ),
    "a truncated npy": ("own.npy", saved("own.npy", array=GREY)[:-10], "own.npy: not a readable array file"),
    "a truncated npy header": ("own.npy", saved("own.npy", array=GREY)[:40], "own.npy: not a readable array file"),
    "text": ("own.npy", b"0 1 1 0\n1 0 0 1\n", "own.npy: not a readable array file"),
    "objects": ("own.npy", objects("own.npy"), "not a readable array file: object arrays are not read"),
    "objects in an npz": ("own.npz", objects("own.npz"), "not a readable array file: object arrays are not read"),
}

BAD_ARRAYS = {
    "strings": (np.array(["a", "b"] * 10), "expected numbers, got dtype <U1"),
    "complex numbers": (FLOATS.astype(np.complex128), "expected numbers, got dtype complex128"),
    "records": (np.zeros(20, dtype=[("x", "f4")]), "expected numbers, got dtype"),
    "dates": (np.zeros((20, 4), "datetime64[s]"), "expected numbers, got dtype"),
    "NaN": (with_value(FLOATS, np.nan), "expected finite values, got NaN or infinity in train"),
    "infinity": (with_value(FLOATS, np.inf), "expected finite values, got NaN or infinity in train"),
    "minus infinity": (with_value(FLOATS, -np.inf), "expected finite values, got NaN or infinity in train"),
    "floats beyond float32": (with_value(FLOATS, 1e39), "expected finite values, got NaN or infinity in train"),
    "integers below 0": (GREY.astype(np.int64) - 1, "uint8 levels, .* got int64 from -1 .*as float32 for real values"),
    "counts beyond single precision": (GREY.astype(np.int64) + 2**25, "counts from 0 to 16,777,216, .* got int64 from"),
    "int8 below 0": (BITS.astype(np.int8) - 1, "zeros and ones, .* got int8 from -1 to 0"),
    "five dimensions": (np.zeros((20, 1, 4, 5, 1), np.uint8), r"got shape \(20, 1, 4, 5, 1\) in train"),
    "one dimension": (np.zeros(20, np.uint8), r"got shape \(20,\) in train"),
    "no dimension": (np.array(1, np.uint8), r"got shape \(\)"),
    "two channels": (np.zeros((20, 4, 5, 2), np.uint8), r"with 1 or 3 channels, got shape \(20, 4, 5, 2\)"),
    "images last": (
        np.zeros((8, 9, 3, 20), np.uint8),
        r"got shape \(8, 9, 3, 20\) in train; .*moveaxis",
    ),
    "no images": (np.zeros((0, 4, 5), np.uint8), "expected at least one image in every split, got an empty array"),
    "no width": (np.zeros((20, 4, 0), np.uint8), r"expected at least one pixel, got shape \(20, .*4, 0\) in train"),
    "nine images": (np.zeros((9, 4, 5), np.uint8), "expected at least 10 images to split, got 9"),
}

BAD_SPLITS = {
    "no train": ({"valid": GREY, "test": GREY}, r"arrays named train, valid and test, got \['valid', 'test'\]"),
    "only labels and names": ({"a": GREY, "b": GREY}, r"expected one array, or arrays named .* got \['a', 'b'\]"),
    "no arrays": ({}, "expected one array, or arrays named train, valid and test, got none"),
    "images of two shapes": (
        {"train": GREY, "test": GREY[:, :, :4]},
        r"expected images of one shape in all splits, got \[\(1, 4, 4\), \(1, 4, 5\)\]",
    ),
    "images and a table": (
        {"train": GREY, "test": GREY.reshape(20, 20)},
        r"expected images of one shape in all splits, got \[\(1, 4, 5\), \(20,\)\]",
    ),
    "binary train, gray test": ({"train": BITS, "test": GREY}, "expected binary in test as in train"),
    "binary train, fractions in validation": (
        {"train": BITS, "valid": FLOATS},
        "expected binary in validation as in train",
    ),
    "uint8 train, float test": ({"train": GREY, "test": FLOATS}, "expected 8-bit levels in test as in train"),
    "float train, uint8 test": ({"train": FLOATS, "test": GREY}, "expected probabilities in test as in train"),
    "NaN in test": (
        {"train": FLOATS, "test": with_value(FLOATS, np.nan)},
        "expected finite values, got NaN or infinity in test: 1 of the values",
    ),
    "infinity in a test of real values": (
        {"train": 3 * FLOATS, "test": with_value(FLOATS, np.inf)},
        "expected finite values, got NaN or infinity in test: 1 of the values",
    ),
    "integers in a test of real values": (
        {"train": 3 * FLOATS, "test": GREY},
        "expected real values in test as in train",
    ),
    "strings in test": ({"train": BITS, "test": np.array(["a"] * 20)}, "expected binary in test as in train"),
    "an empty test split": (
        {"train": GREY, "test": GREY[:0]},
        "expected at least one image in every split, got an empty array",
    ),
    "a test split without dimensions": ({"train": BITS, "test": np.array(1)}, r"got shape \(\)"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, what: str) -> None:
    name, content, message = BAD_FILES[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / name))


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_an_array_that_is_no_images_is_refused(tmp_path: Path, what: str) -> None:
    array, message = BAD_ARRAYS[what]
    with pytest.raises(ValueError, match=f"own.npy: .*{message}"):
        own(tmp_path, array)


@pytest.mark.parametrize("what", BAD_SPLITS)
def test_splits_that_do_not_belong_together_are_refused(tmp_path: Path, what: str) -> None:
    arrays, message = BAD_SPLITS[what]
    with pytest.raises(ValueError, match=f"own.npz: .*{message}"):
        own(tmp_path, **arrays)


def test_a_text_file_is_not_called_an_object_array(tmp_path: Path) -> None:
    (tmp_path / "own.npy").write_text("0 1 1 0\n1 0 0 1\n")
    with pytest.raises(ValueError, match="not a readable array file") as refused:
        data.load(str(tmp_path / "own.npy"))
    assert "object" not in str(refused.value)


@pytest.mark.parametrize("what", ["objects", "objects in an npz", "text"])
def test_nobody_is_told_to_allow_pickles(tmp_path: Path, what: str) -> None:
    name, content, _ = BAD_FILES[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as refused:
        data.load(str(tmp_path / name))
    assert "pickle" not in str(refused.value)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Touches:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "was_run",))

    np.save(tmp_path / "own.npy", np.array([Touches()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="object arrays are not read"):
        data.load(str(tmp_path / "own.npy"))
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["missing.npz", "no/such/folder.npy"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"dataset: .*{name} cannot be read: No such file"):
        data.load(str(tmp_path / name))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.npz").mkdir()
    with pytest.raises(ValueError, match=r"own\.npz cannot be read"):
        data.load(str(tmp_path / "own.npz"))


@pytest.mark.parametrize("word", ["MNIST", "cifar", "own.csv", "own", ""])
def test_an_unknown_data_set_is_refused(word: str) -> None:
    with pytest.raises(
        ValueError, match=r"dataset: expected mnist, .*svhn, or the path of an \.npz or \.npy file or of a"
    ):
        data.load(word)


# --- Subsets ---


@pytest.mark.parametrize(("num_images", "most"), [(10_000, 20), (10_000, 5_000), (50, 49), (3, 1)])
def test_a_subset_has_the_size_that_was_asked_for(num_images: int, most: int) -> None:
    assert len(data.subset(num_images, most)) == most


@pytest.mark.parametrize(("num_images", "most"), [(10_000, 20), (10_000, 5_000), (50, 49)])
def test_a_subset_is_ascending_and_so_without_repeats(num_images: int, most: int) -> None:
    index = data.subset(num_images, most)
    assert (index.diff() > 0).all()
    assert index[0] >= 0
    assert index[-1] < num_images


def test_a_subset_is_the_same_at_every_call() -> None:
    np.random.seed(1)  # noqa: NPY002 (the global generators are what must not matter)
    torch.manual_seed(1)
    first = data.subset(10_000, 100)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(first, data.subset(10_000, 100))


@pytest.mark.parametrize("most", [None, 50, 51, 10_000])
def test_a_subset_is_all_images_where_there_are_no_more(most: int | None) -> None:
    assert data.subset(50, most).tolist() == list(range(50))


@pytest.mark.parametrize("most", [10, 100, 1_000])
def test_a_subset_is_not_the_first_images(most: int) -> None:
    """Image i of a random subset of n among N lies near i N / n: the mean index is (N - 1) / 2, within its error."""
    num_images = 10_000
    index = data.subset(num_images, most).double()
    stderr = math.sqrt((num_images**2 - 1) / 12 / most)
    assert (index.mean() - (num_images - 1) / 2).abs() < 4 * stderr


def test_a_subset_of_a_sorted_file_holds_every_class() -> None:
    assert (data.subset(10_000, 500) // 1_000).unique().tolist() == list(range(10))


@pytest.mark.parametrize("binarization", ["fixed", "threshold", "none"])
@pytest.mark.parametrize("values", ["binary", "levels", "probabilities"])
def test_what_training_sees_once_and_for_all_is_what_evaluation_sees(
    binarization: str, values: str, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    array = {
        "binary": generator.integers(0, 2, (40, 6), dtype=np.uint8),
        "levels": generator.integers(0, 256, (40, 6), dtype=np.uint8),
        "probabilities": generator.random((40, 6), dtype=np.float32),
    }[values]
    np.save(tmp_path / "own.npy", array)
    splits = data.load(str(tmp_path / "own.npy"))
    stored, observe = data.training_images(splits, binarization)
    seen = observe(stored, torch.Generator())
    assert torch.equal(seen, data.evaluation_images(splits, "train", binarization))
    assert torch.equal(seen, data.expected_images(splits, binarization))


def test_a_dynamic_draw_is_the_expected_image_on_average(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (40, 6), dtype=np.uint8)
    np.save(tmp_path / "own.npy", levels)
    splits = data.load(str(tmp_path / "own.npy"))
    stored, observe = data.training_images(splits, "dynamic")
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([observe(stored, generator) for _ in range(2000)]).mean(0)
    expected = data.expected_images(splits, "dynamic")
    error = (expected * (1 - expected) / 2000).sqrt()
    assert ((mean - expected).abs() <= 5 * error + 1e-6).all()


def test_uint8_that_never_comes_near_255_is_said_to_be_nearly_black(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.random.default_rng(0).integers(0, 17, (40, 8, 8), dtype=np.uint8))
    assert (
        "8-bit levels from 0 to 16 (read as level / 255, so nearly black"
        in data.load(str(tmp_path / "own.npy")).describe()
    )


# --- Labels ---


def test_labels_follow_their_images_through_the_permutation(tmp_path: Path) -> None:
    read = own(tmp_path, images=numbered(0, 200), labels=np.arange(200) + 1000)
    for split in ("train", "validation", "test"):
        assert [label - 1000 for label in read.labels[split].tolist()] == numbers(getattr(read, split))


LABEL_KEYS = {
    "train_labels": ("train", "valid", "test", "{}_labels"),
    "y_train": ("x_train", "x_val", "x_test", "y_{}"),
    "train_images": ("train_images", "validation_images", "test_images", "{}_labels"),
}


@pytest.mark.parametrize("form", LABEL_KEYS)
def test_each_name_of_labels_is_read(tmp_path: Path, form: str) -> None:
    *images, of_labels = LABEL_KEYS[form]
    arrays = {}
    for start, key in zip((0, 40, 60), images, strict=True):
        arrays[key] = numbered(start, start + 20)
        word = key.removeprefix("x_").removesuffix("_images")
        arrays[of_labels.format(word)] = np.arange(start, start + 20, dtype=np.uint16)[:, None]
    read = own(tmp_path, **arrays)
    for split in ("train", "validation", "test"):
        assert read.labels[split].tolist() == numbers(getattr(read, split))


@pytest.mark.parametrize("key", ["labels", "y"])
def test_labels_beside_one_array_are_its_labels(tmp_path: Path, key: str) -> None:
    read = own(tmp_path, **{"x": numbered(0, 50), key: np.arange(50)})
    assert read.labels["test"].tolist() == numbers(read.test)


def test_labels_are_int64(tmp_path: Path) -> None:
    assert own(tmp_path, x=numbered(0, 50), y=np.arange(50, dtype=np.uint8)).labels["train"].dtype == torch.int64


def test_a_file_without_labels_has_none(tmp_path: Path) -> None:
    assert own(tmp_path, numbered(0, 50)).labels == {}


def test_a_description_counts_classes_without_names(tmp_path: Path) -> None:
    assert own(tmp_path, x=numbered(0, 50), y=np.arange(50) % 7).describe().endswith("; 7 classes")


def test_a_description_counts_one_class_in_the_singular(tmp_path: Path) -> None:
    assert own(tmp_path, x=numbered(0, 50), y=np.zeros(50, int)).describe().endswith("; 1 class")


@pytest.mark.parametrize("labels", [np.arange(49), np.zeros((51, 50)), np.array(["a"] * 49), np.array(1)])
def test_labels_of_another_number_than_the_images_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"own.npz: train labels: expected 50 labels, one per image, got shape"):
        own(tmp_path, x=numbered(0, 50), y=labels)


# --- Real values ---


@pytest.fixture
def real(tmp_path: Path) -> data.Splits:
    return own(tmp_path, np.random.default_rng(3).normal(size=(50, 6)))


def test_real_values_resolve_to_no_binarization(real: data.Splits) -> None:
    assert data.resolve_binarization(real, None) == "none"


@pytest.mark.parametrize("binarization", ["dynamic", "fixed", "threshold"])
def test_a_binarization_of_real_values_is_refused(real: data.Splits, binarization: str) -> None:
    with pytest.raises(ValueError, match=f"binarization: expected none for real values .*, got {binarization}"):
        data.resolve_binarization(real, binarization)


def test_real_values_are_seen_as_they_are(real: data.Splits) -> None:
    stored, observe = data.training_images(real, "none")
    assert torch.equal(observe(stored, torch.Generator()), real.train)
    assert torch.equal(data.evaluation_images(real, "test", "none"), real.test)


def test_a_description_says_the_range_of_real_values(tmp_path: Path) -> None:
    assert "real values from -1.25 to 3.5, 2;" in own(tmp_path, np.array([[-1.25, 3.5]] * 20)).describe()


def test_floats_that_look_like_levels_are_said_to(tmp_path: Path) -> None:
    assert "as uint8 they would be 8-bit levels" in own(tmp_path, GREY.astype(np.float32)).describe()


@pytest.mark.parametrize(("default", "expected"), [("none", "none"), ("threshold", "threshold")])
def test_gray_data_resolves_to_the_default_that_is_given(gray: data.Splits, default: str, expected: str) -> None:
    assert data.resolve_binarization(gray, None, default=default) == expected


# --- The entropy of a draw ---


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("binarization", ["dynamic", "fixed"])
def test_the_entropy_of_a_draw_is_that_of_its_bernoullis(gray: data.Splits, split: str, binarization: str) -> None:
    entropy = data.binarization_entropy(gray, split, binarization)
    expected = bernoulli.entropy(getattr(gray, split).double().numpy() / 255).sum(axis=(1, 2, 3))
    assert entropy is not None
    np.testing.assert_allclose(entropy.numpy(), expected, rtol=1e-12)


def test_the_entropy_of_probabilities_is_theirs(tmp_path: Path) -> None:
    read = own(tmp_path, np.array([[0.5, 0.25, 0.0, 1.0]] * 20))
    entropy = data.binarization_entropy(read, "test", "dynamic")
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([math.log(2) + 0.25 * math.log(4) + 0.75 * math.log(4 / 3)] * 2, rel=1e-14)


def test_the_entropy_of_mnists_test_set_is_45_53_nats(mnist: data.Splits) -> None:
    entropy = data.binarization_entropy(mnist, "test", "dynamic")
    assert entropy is not None
    assert (tuple(entropy.shape), entropy.dtype) == ((10_000,), torch.float64)
    assert entropy.mean().item() == pytest.approx(45.53, abs=0.005)


@pytest.mark.parametrize("binarization", ["threshold", "none"])
def test_where_nothing_is_drawn_there_is_no_entropy(gray: data.Splits, binarization: str) -> None:
    assert data.binarization_entropy(gray, "test", binarization) is None


@pytest.mark.parametrize("values", [BITS.reshape(20, 20), 3 * FLOATS], ids=["binary", "real values"])
def test_data_that_is_never_drawn_has_no_entropy(tmp_path: Path, values: np.ndarray) -> None:
    assert data.binarization_entropy(own(tmp_path, values), "train", "dynamic") is None


# --- The protocol of Burda et al. (2015) ---


@pytest.fixture(scope="module")
def iwae() -> data.Splits:
    return data.load("mnist", protocol="iwae")


def test_under_iwae_all_training_images_train(iwae: data.Splits, idx: SimpleNamespace) -> None:
    np.testing.assert_array_equal(iwae.train.numpy(), idx.train)


def test_under_iwae_all_training_labels_train(iwae: data.Splits) -> None:
    np.testing.assert_array_equal(
        iwae.labels["train"].numpy(), np.frombuffer(raw_mnist("train-labels-idx1-ubyte")[8:], np.uint8)
    )


def test_under_iwae_no_image_validates(iwae: data.Splits) -> None:
    assert tuple(iwae.validation.shape) == (0, 1, 28, 28)
    with pytest.raises(ValueError, match="mnist: has no validation images under the iwae protocol"):
        data.evaluation_images(iwae, "validation", "dynamic")


def test_under_iwae_the_test_set_is_drawn_from_the_seed(iwae: data.Splits, idx: SimpleNamespace) -> None:
    expected = np.random.RandomState(5).binomial(1, idx.test.astype(np.float32) / 255)
    np.testing.assert_array_equal(data.evaluation_images(iwae, "test", "dynamic", seed=5).numpy(), expected)


def test_under_iwae_another_seed_is_another_draw(iwae: data.Splits) -> None:
    first, second = (data.evaluation_images(iwae, "test", "dynamic", seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_under_iwae_a_fixed_draw_is_fixed(iwae: data.Splits) -> None:
    first, second = (data.evaluation_images(iwae, "test", "fixed", seed=seed) for seed in (0, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize("binarization", ["dynamic", "fixed", "threshold", "none"])
def test_otherwise_the_seed_changes_nothing(gray: data.Splits, binarization: str) -> None:
    first, second = (data.evaluation_images(gray, "test", binarization, seed=seed) for seed in (0, 1))
    assert torch.equal(first, second)


def test_a_description_says_the_iwae_protocol(iwae: data.Splits) -> None:
    assert "60,000 / 0 / 10,000 (iwae protocol: all training images train, and test is drawn anew" in iwae.describe()


@pytest.mark.parametrize("dataset", ["static-mnist", "caltech-silhouettes", "cifar10", "svhn", "own.npz"])
def test_the_iwae_protocol_is_for_the_gray_sets_alone(dataset: str) -> None:
    with pytest.raises(
        ValueError, match=rf"protocol: expected vampprior for {dataset} \(iwae is for mnist, fashion-mnist"
    ):
        data.load(dataset, protocol="iwae")


@pytest.mark.parametrize("argument", [{"image_size": (8, 8)}, {"color": "gray"}], ids=str)
@pytest.mark.parametrize("dataset", ["mnist", "own.npy"])
def test_what_is_for_folders_is_refused_elsewhere(dataset: str, argument: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))}: expected none for {dataset}"):
        data.load(dataset, **argument)


@pytest.mark.parametrize("argument", ["protocol", "fit", "color"])
def test_a_word_of_no_meaning_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected one of .*, got 'sepia'"):
        data.load("mnist", **{argument: "sepia"})


def test_values_that_single_precision_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    far = 1e6 + 0.05 * np.random.default_rng(0).normal(size=(40, 3))
    with pytest.raises(ValueError, match=r"expected values that single precision can tell apart, got float64 around"):
        own(tmp_path, far)
    assert own(tmp_path, far - 1e6).kind == data.REAL
