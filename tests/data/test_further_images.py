"""Data: a person's further images for a trained model, from arrays and from image files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vae import data

GENERATOR = np.random.default_rng(0)
E = (1, 4, 5)
GREY = GENERATOR.integers(0, 256, (6, *E[1:]), np.uint8)
BITS = GENERATOR.integers(0, 2, (6, *E[1:]), np.uint8)
FRACTIONS = GENERATOR.random((6, *E[1:]))
REALS = GENERATOR.normal(size=(6, *E[1:])) * 3


def trained_on(kind: str, event_shape: tuple[int, ...] = E, class_names: tuple[str, ...] = ()) -> data.Splits:
    """What a model was trained on, of which only kind, shape and classes matter here."""
    dtype = torch.uint8 if kind in (data.BINARY, data.LEVELS) else torch.float32
    none = torch.zeros((0, *event_shape), dtype=dtype)
    return data.Splits("own", kind, none, none, none, sha256="", split="", class_names=class_names)


def saved(folder: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> str:
    if array is not None:
        np.save(folder / "own.npy", array)
        return str(folder / "own.npy")
    np.savez(folder / "own.npz", **arrays)
    return str(folder / "own.npz")


def picture(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


# --- Arrays: scale ---

SCALES = {  # training data, array -> what the model sees without binarization
    "levels for levels": (data.LEVELS, GREY, GREY / 255),
    "fractions for levels": (data.LEVELS, FRACTIONS, FRACTIONS),
    "fractions for probabilities": (data.PROBABILITIES, FRACTIONS, FRACTIONS),
    "bits for bits": (data.BINARY, BITS, BITS),
    "floats of bits for bits": (data.BINARY, BITS.astype(np.float64), BITS),
    "reals for reals": (data.REAL, REALS, REALS),
}


@pytest.mark.parametrize("what", SCALES)
def test_each_array_is_brought_to_the_scale_of_the_training_data(tmp_path, what):
    kind, array, expected = SCALES[what]
    x = data.load_images(saved(tmp_path, array), trained_on(kind), "none").x
    assert (x.dtype, tuple(x.shape)) == (torch.float32, (6, *E))
    np.testing.assert_allclose(x[:, 0].numpy(), expected, rtol=2e-7)


OFF_SCALE = {
    "levels for bits": (data.BINARY, GREY, "expected zeros and ones .*trained on binary"),
    "reals for levels": (data.LEVELS, REALS, r"expected uint8 levels, or floats in \[0, 1\] .*trained on 8-bit levels"),
    "levels for probabilities": (data.PROBABILITIES, GREY, r"expected floats in \[0, 1\] .*got uint8 from"),
    "levels for reals": (data.REAL, GREY, "expected finite floats .*trained on real values.*, got uint8 from"),
    "infinity for reals": (data.REAL, np.where(REALS > 0, np.inf, REALS), "expected finite floats .* to inf"),
    "words": (data.LEVELS, np.full((6, *E[1:]), "a"), "expected numbers, got dtype <U1"),
}


@pytest.mark.parametrize("what", OFF_SCALE)
def test_an_array_of_another_scale_is_refused(tmp_path, what):
    kind, array, message = OFF_SCALE[what]
    with pytest.raises(ValueError, match=f"own.npy: {message}"):
        data.load_images(saved(tmp_path, array), trained_on(kind), "none")


# --- Arrays: shape ---

COLOR = GENERATOR.integers(0, 256, (6, 3, 4, 5), np.uint8)
LAYOUTS = {
    "without a channel": ((1, 4, 5), GREY, GREY[:, None]),
    "channel last": ((1, 4, 5), GREY[..., None], GREY[:, None]),
    "channel first": ((1, 4, 5), GREY[:, None], GREY[:, None]),
    "colors last": ((3, 4, 5), COLOR.transpose(0, 2, 3, 1), COLOR),
    "colors first": ((3, 4, 5), COLOR, COLOR),
    "a table": ((20,), GREY.reshape(6, 20), GREY.reshape(6, 20)),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_each_layout_becomes_the_event_shape(tmp_path, what):
    event_shape, array, expected = LAYOUTS[what]
    x = data.load_images(saved(tmp_path, array), trained_on(data.LEVELS, event_shape), "none").x
    np.testing.assert_array_equal((x * 255).round().numpy(), expected)


WRONG_SHAPES = {
    "another size": (GREY[:, :3], r"got an array of shape \(6, 3, 5\)"),
    "colors": (COLOR, r"got an array of shape \(6, 3, 4, 5\)"),
    "a table": (GREY.reshape(6, 20), r"got an array of shape \(6, 20\)"),
}


@pytest.mark.parametrize("what", WRONG_SHAPES)
def test_another_event_shape_is_refused(tmp_path, what):
    array, message = WRONG_SHAPES[what]
    with pytest.raises(ValueError, match=rf"own.npy: expected images of event shape \(1, 4, 5\), {message}"):
        data.load_images(saved(tmp_path, array), trained_on(data.LEVELS), "none")


# --- Arrays: names and labels ---


@pytest.mark.parametrize(
    ("key", "others"),
    [("test", {"a": COLOR}), ("images", {"a": COLOR}), ("x", {"a": COLOR}), ("mine", {"y": np.arange(6)})],
)
def test_each_name_of_images_is_read(tmp_path, key, others):
    read = data.load_images(saved(tmp_path, **{**others, key: GREY}), trained_on(data.LEVELS), "none")
    np.testing.assert_allclose(read.x[:, 0], GREY / 255, rtol=2e-7)
    assert read.names == tuple("012345")


@pytest.mark.parametrize("key", ["labels", "y", "test_labels", "y_test"])
def test_each_name_of_labels_is_read_beside_images(tmp_path, key):
    read = data.load_images(saved(tmp_path, **{"test": GREY, key: np.arange(6)}), trained_on(data.LEVELS), "none")
    assert read.labels is not None
    assert read.labels.tolist() == list(range(6))


# --- Binarization ---


@pytest.mark.parametrize("binarization", ["dynamic", "fixed"])
@pytest.mark.parametrize(("kind", "array"), [(data.LEVELS, GREY), (data.PROBABILITIES, FRACTIONS)])
def test_gray_images_are_one_draw_from_the_seed(tmp_path, kind, array, binarization):
    rates = array.astype(np.float32) / np.float32(255 if array.dtype == np.uint8 else 1)
    expected = np.random.RandomState(3).binomial(1, rates)
    x = data.load_images(saved(tmp_path, array), trained_on(kind), binarization, seed=3).x
    np.testing.assert_array_equal(x[:, 0].numpy(), expected)


# --- Missing pixels ---

HOLES = np.zeros((6, *E[1:]), bool)
HOLES[:, 1:3, 2:] = True


@pytest.mark.parametrize("binarization", ["dynamic", "fixed", "threshold", "none"])
@pytest.mark.parametrize("kind", [data.LEVELS, data.PROBABILITIES])
def test_a_missing_pixel_stays_missing_and_no_other_is(tmp_path, kind, binarization):
    path = saved(tmp_path, np.where(HOLES, np.nan, FRACTIONS))
    x = data.load_images(path, trained_on(kind), binarization).x
    np.testing.assert_array_equal(x[:, 0].isnan().numpy(), HOLES)


# --- Image files ---


def test_a_folder_is_brought_to_size_and_gray(tmp_path):
    for i, size in enumerate([(8, 10), (4, 5), (40, 5)]):
        picture(tmp_path / f"{i}.png", np.full((*size, 3), 50 * (i + 1), np.uint8))
    read = data.load_images(str(tmp_path), trained_on(data.LEVELS), "none")
    assert read.names == ("0.png", "1.png", "2.png")
    expected = np.array([50, 100, 150])[:, None, None, None] / 255
    np.testing.assert_allclose(read.x.numpy(), np.broadcast_to(expected, (3, *E)), rtol=2e-7)


def test_a_single_image_file_is_one_image(tmp_path):
    path = picture(tmp_path / "own.png", GREY[0])
    picture(tmp_path / "other.png", GREY[1])
    read = data.load_images(path, trained_on(data.LEVELS), "none")
    assert read.names == ("own.png",)
    np.testing.assert_allclose(read.x[0, 0].numpy(), GREY[0] / 255, rtol=2e-7)
    assert read.notes == ()
    drawn = data.load_images(path, trained_on(data.LEVELS), "dynamic", seed=4).x
    expected = np.random.RandomState(4).binomial(1, GREY[0].astype(np.float32) / 255)
    np.testing.assert_array_equal(drawn[0, 0].numpy(), expected)


@pytest.mark.parametrize(("names", "labels"), [(("cat", "dog"), [1, 2]), (("dog", "wolf"), None)])
def test_files_in_folders_of_known_classes_have_their_labels(tmp_path, names, labels):
    for name in names:
        picture(tmp_path / name / "own.png", GREY[0])
    read = data.load_images(str(tmp_path), trained_on(data.LEVELS, class_names=("ant", "cat", "dog")), "none")
    assert read.names == tuple(f"{name}/own.png" for name in names)
    assert (None if read.labels is None else read.labels.tolist()) == labels
    assert ["wolf" in note for note in read.notes] == [True] * (labels is None)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_images_of_another_size_are_counted_with_what_was_done_to_them(tmp_path, fit):
    for i, size in enumerate([(4, 5), (8, 10), (40, 5)]):
        picture(tmp_path / f"{i}.png", np.full(size, 50, np.uint8))
    (note,) = data.load_images(str(tmp_path), trained_on(data.LEVELS), "none", fit=fit).notes
    assert all(words in note for words in ("2 of 3 images", "4x5"))
    assert ("cut" in note, "stretched" in note) == (fit == "crop", fit == "stretch")


def test_colors_that_are_made_gray_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "gray.png", GREY[0])
    picture(tmp_path / "red.png", GREY[1][..., None] * np.array([1, 0, 0], np.uint8))
    (note,) = data.load_images(str(tmp_path), trained_on(data.LEVELS), "none").notes
    assert "1 of 2 images are stored in color" in note
    assert data.load_images(str(tmp_path), trained_on(data.LEVELS, (3, 4, 5)), "none").notes == ()


def test_what_image_files_leave_out_is_noted(tmp_path):
    frames = [Image.fromarray(image) for image in GREY[:3]]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    (tmp_path / "0.heic").write_bytes(b"")
    own = data.load_images(str(tmp_path), trained_on(data.LEVELS), "none")
    assert (255 * own.x[0, 0]).round().int().tolist() == GREY[0].tolist()
    assert any("pages" in note and "1 of 1 image" in note for note in own.notes)
    assert any("1 .heic" in note for note in own.notes)


def test_white_strokes_on_a_transparent_ground_are_refused(tmp_path):
    opacity = Image.fromarray(GREY[0])
    Image.merge("LA", [Image.new("L", opacity.size, 255), opacity]).save(tmp_path / "white.png")
    with pytest.raises(ValueError, match="expected images that show something, got only level 255"):
        data.load_images(str(tmp_path / "white.png"), trained_on(data.LEVELS), "none")


# --- Images that the run has ---


@pytest.mark.parametrize("kind", [data.LEVELS, data.BINARY, data.REAL])
def test_an_image_of_the_runs_data_is_found_in_its_split(tmp_path, kind):
    own = {data.LEVELS: GREY, data.BINARY: BITS, data.REAL: REALS}[kind][:, None]
    splits = trained_on(kind)
    stored = torch.from_numpy(own).to(splits.train.dtype)
    splits = replace(splits, train=stored[:2], validation=stored[2:3], test=stored[3:4])
    array = own.astype(np.float64) / 255 if kind == data.LEVELS else own.astype(np.float64)
    found = data.load_images(saved(tmp_path, array), splits, "none").splits
    assert found == ("train", "train", "validation", "test", "", "")
    array[:, 0, 0, 0] = np.nan
    assert not any(data.load_images(saved(tmp_path, array), splits, "none").splits)
