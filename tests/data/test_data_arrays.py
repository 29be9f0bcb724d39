"""Data: arrays that can be read in more than one way, columns beyond single precision, and the labels beside them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest

from ppl_vae import data
from ppl_vae.data import machine

RNG = np.random.default_rng(0)


def load(folder: Path, array: np.ndarray) -> data.Splits:
    np.save(folder / "own.npy", array)
    return data.load(str(folder / "own.npy"))


def all_images(splits: data.Splits) -> np.ndarray:
    """All images, in the order of their bytes."""
    images = np.concatenate([splits.train, splits.validation, splits.test])
    return images[np.lexsort(images.reshape(len(images), -1).T)]


# --- Shapes ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", ["small", "large"])
def test_channels_may_come_first_or_last(
    tmp_path: Path, channels: int, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
        monkeypatch.setattr(machine, "LARGE", 0)
    first = RNG.integers(0, 256, (20, channels, 6, 5), np.uint8)
    read = load(tmp_path, first)
    assert read.event_shape == (channels, 6, 5)
    np.testing.assert_array_equal(all_images(read), first[np.lexsort(first.reshape(20, -1).T)])
    np.testing.assert_array_equal(all_images(read), all_images(load(tmp_path, np.moveaxis(first, 1, -1))))


DOUBTFUL = {  # shape -> E as it is read, and what makes it the other reading
    "one color image": ((64, 48, 3), (1, 48, 3), None, None),
    "one image with opacity": ((64, 48, 4), (1, 48, 4), None, None),
    "images along the last axis": ((28, 28, 50), (1, 28, 50), lambda a: np.moveaxis(a, -1, 0), (1, 28, 28)),
    "images along the last axis, not square": ((12, 30, 50), (1, 30, 50), lambda a: np.moveaxis(a, -1, 0), (1, 12, 30)),
    "rows along the last axis": ((12, 50), (50,), lambda a: a.T, (12,)),
    "one gray image": ((64, 64), (64,), None, None),
    "channels at both ends": ((50, 3, 8, 1), (1, 3, 8), lambda a: a.transpose(0, 2, 3, 1), None),
}


@pytest.mark.parametrize("what", DOUBTFUL)
def test_a_shape_with_two_readings_is_read_with_a_line_on_both(tmp_path: Path, what: str) -> None:
    shape, event_shape, otherwise, other_event_shape = DOUBTFUL[what]
    array = RNG.integers(0, 256, shape, np.uint8)
    read = load(tmp_path, array)
    assert read.event_shape == event_shape
    (note,) = read.notes
    assert str(shape) in note
    assert note in read.describe().splitlines()[1]
    if other_event_shape is not None:
        other = load(tmp_path, otherwise(array))
        assert (other.event_shape, other.notes) == (other_event_shape, ())


@pytest.mark.parametrize(
    "shape", [(50, 28, 28), (20, 28, 28), (50, 12), (50, 8, 9, 3), (50, 3, 8, 9), (50, 1, 8, 9), (50, 8, 9, 1)]
)
def test_a_shape_with_one_reading_needs_no_line(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert load(tmp_path, RNG.integers(0, 256, shape, np.uint8)).notes == ()


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_doubtful_shape_is_said_at_each_start(tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if size == "large":
        monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
        monkeypatch.setattr(machine, "LARGE", 0)
    load(tmp_path, RNG.integers(0, 256, (28, 28, 50), np.uint8))
    assert "(28, 28, 50)" in data.load(str(tmp_path / "own.npy")).describe()


# --- Columns that single precision cannot resolve ---

TIMES = 1.6e9 + RNG.uniform(-30, 30, 400)
WIDE = 1e9 * RNG.normal(size=400)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_each_column_must_be_resolved_by_single_precision(
    tmp_path: Path, order: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds within a minute become 1 of few numbers, whatever the column beside them."""
    if size == "large":
        monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
        monkeypatch.setattr(machine, "LARGE", 0)
    assert len(np.unique(TIMES.astype(np.float32))) <= 3
    table = np.array(np.stack([WIDE, TIMES], 1), order=order)
    with pytest.raises(ValueError, match=r"around 1.6e\+09 with a spread of 1[78] in column 1 of train; center"):
        load(tmp_path, table)
    centered = table - table.mean(0)
    read = load(tmp_path, centered)
    assert read.kind == data.REAL
    np.testing.assert_array_equal(all_images(read)[:, 1], centered[np.lexsort(centered.T)][:, 1].astype(np.float32))


def test_several_columns_beyond_single_precision_are_counted(tmp_path: Path) -> None:
    table = np.stack([WIDE, TIMES, -TIMES, 2 * TIMES], 1)
    with pytest.raises(ValueError, match="in column 1 of train, and likewise in 2 more columns"):
        load(tmp_path, table)


@pytest.mark.parametrize("noise", [0.0, 1e-16], ids=["exact", "rounded in double precision"])
def test_a_constant_column_needs_no_resolution(tmp_path: Path, noise: float) -> None:
    constant = 0.3 * (1 + noise * RNG.integers(-2, 3, 400))
    assert load(tmp_path, np.stack([WIDE, constant], 1)).kind == data.REAL


# --- Counts ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_whole_numbers_from_0_are_counts_also_as_floats(tmp_path: Path, dtype: type) -> None:
    counts = RNG.poisson(4.0, (50, 6))
    read = load(tmp_path, counts.astype(dtype))
    assert read.kind == data.COUNTS
    np.testing.assert_array_equal(all_images(read), counts[np.lexsort(counts.T)])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_floats_that_are_whole_in_train_alone_are_real_values(tmp_path: Path, split: str) -> None:
    counts = RNG.poisson(4.0, (50, 6)).astype(np.float64)
    np.savez(tmp_path / "own.npz", **{"train": counts, split: counts + 0.5})
    assert data.load(str(tmp_path / "own.npz")).kind == data.REAL


# --- Names of files and arrays ---

NUMBERS = RNG.integers(0, 256, (60, 4, 5), np.uint8)
KERAS = {"x_train": NUMBERS[:40], "y_train": np.arange(40), "x_test": NUMBERS[40:], "y_test": np.arange(40, 60)}
STYLES = {
    "Keras": KERAS,
    "scikit-learn": {name.replace("x_", "X_"): array for name, array in KERAS.items()},
    "MedMNIST": {
        f"{split}_{what}": KERAS[f"{letter}_{split}"].reshape(-1, *shape)
        for split in ("train", "test")
        for what, letter, shape in (("images", "x", (4, 5)), ("labels", "y", (1,)))
    },
    "the split first": {f"{name[2:]}_{name[0]}": array for name, array in KERAS.items()},
}


@pytest.mark.parametrize("style", STYLES)
def test_usual_names_of_arrays_are_understood_for_training_and_for_further_images(tmp_path: Path, style: str) -> None:
    path = str(tmp_path / "own.npz")
    np.savez(path, **STYLES[style])
    splits = data.load(path)
    np.testing.assert_array_equal(splits.test[:, 0], NUMBERS[40:])
    assert splits.labels["test"].tolist() == list(range(40, 60))
    assert sorted([*splits.labels["train"].tolist(), *splits.labels["validation"].tolist()]) == list(range(40))
    further = data.load_images(path, splits, "none")
    np.testing.assert_allclose(further.x[:, 0].numpy(), NUMBERS[40:] / 255, rtol=2e-7)
    assert further.labels is not None
    assert further.labels.tolist() == list(range(40, 60))
    assert any("test" in note for note in further.notes)


def test_training_images_alone_are_taken_as_further_images(tmp_path: Path) -> None:
    path = str(tmp_path / "own.npz")
    np.savez(path, x_train=NUMBERS, y_train=np.arange(60))
    further = data.load_images(path, data.load(path), "none")
    assert further.labels is not None
    assert further.labels.tolist() == list(range(60))


@pytest.mark.parametrize("name", ["OWN.NPY", "own.Npy", "OWN.NPZ"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_the_end_of_a_files_name_may_be_upper_case(
    tmp_path: Path, name: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
        monkeypatch.setattr(machine, "LARGE", 0)
    with (tmp_path / name).open("wb") as file:
        np.savez(file, x=NUMBERS) if name.lower().endswith("z") else np.save(file, NUMBERS)
    splits = data.load(str(tmp_path / name))
    assert len(splits.train) == 48
    assert data.is_mapped(splits.train) == (size == "large" and name.lower().endswith("npy"))
    assert len(data.load_images(str(tmp_path / name), splits, "none").x) == 60


# --- Labels ---

WORDS = np.array(["dog", "cat", "eel"])[np.arange(60) % 3]
IN_OTHER_FORMS = {
    "words": (WORDS, [1, 0, 2]),
    "bytes": (WORDS.astype("S"), [1, 0, 2]),
    "one-hot integers": (np.eye(3, dtype=np.uint8)[np.arange(60) % 3], [0, 1, 2]),
    "one-hot floats": (np.eye(3)[np.arange(60) % 3], [0, 1, 2]),
    "whole floats": ((np.arange(60) % 3).astype(float), [0, 1, 2]),
    "whole floats in a column": ((np.arange(60) % 3).astype(float)[:, None], [0, 1, 2]),
}


@pytest.mark.parametrize("form", IN_OTHER_FORMS)
def test_labels_in_other_forms_become_class_numbers(tmp_path: Path, form: str) -> None:
    labels, pattern = IN_OTHER_FORMS[form]
    path = str(tmp_path / "own.npz")
    arrays = {"x_train": NUMBERS[:40], "x_val": NUMBERS[40:50], "x_test": NUMBERS[50:]}
    np.savez(path, **arrays, y_train=labels[:40], y_val=labels[40:50], y_test=labels[50:])
    splits = data.load(path)
    found = [*splits.labels["train"].tolist(), *splits.labels["validation"].tolist(), *splits.labels["test"].tolist()]
    assert found == pattern * 20
    assert splits.class_names == (("cat", "dog", "eel") if form in ("words", "bytes") else ())
    further = data.load_images(path, splits, "none")
    assert further.labels is not None
    assert further.labels.tolist() == found[50:]


def test_words_have_the_same_numbers_in_each_split(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "own.npz",
        train=NUMBERS[:40],
        test=NUMBERS[40:],
        train_labels=np.array(["b", "c"])[np.arange(40) % 2],
        test_labels=np.array(["a", "c"])[np.arange(20) % 2],
    )
    splits = data.load(str(tmp_path / "own.npz"))
    assert splits.class_names == ("a", "b", "c")
    assert splits.labels["test"].tolist() == [0, 2] * 10
    assert set(splits.labels["train"].tolist()) == {1, 2}


UNUSABLE = {
    "fractions": np.arange(60) / 7,
    "not a number": np.full(60, np.nan),
    "several of 3 classes": RNG.integers(0, 2, (60, 3)) | np.array([1, 1, 0]),
    "two numbers": np.arange(120).reshape(60, 2),
    "boxes": np.zeros((60, 2, 2)),
    "dates": np.zeros(60, "datetime64[s]"),
    "objects": np.array([f"class {i % 3}" for i in range(60)], dtype=object),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_labels_that_are_no_classes_are_left_out_with_a_line(tmp_path: Path, what: str) -> None:
    path = str(tmp_path / "own.npz")
    np.savez(path, x=NUMBERS, y=UNUSABLE[what])
    splits = data.load(path)
    assert (splits.labels, splits.class_names, len(splits.train)) == ({}, (), 48)
    assert "labels left out" in splits.describe() or "arrays ignored: y" in splits.describe()
    further = data.load_images(path, splits, "none")
    assert (further.labels, len(further.notes)) == (None, 1)


def test_words_that_are_no_class_of_the_training_data_are_left_out_with_a_line(tmp_path: Path) -> None:
    path = str(tmp_path / "own.npz")
    np.savez(path, x=NUMBERS, y=WORDS)
    splits = data.load(path)
    np.savez(path, x=NUMBERS, y=np.where(WORDS == "cat", "elk", WORDS))
    further = data.load_images(path, splits, "none")
    assert further.labels is None
    assert "'elk'" in further.notes[0]


# --- Refusals that name the cure, which works ---


def follow_advice(folder: Path, error: pytest.ExceptionInfo[ValueError], **replaced: str) -> str:
    """Run the lines of NumPy that an error advises, in the folder, and return the path of the file that they write."""
    lines = re.search(r"((?:x = )?numpy\..*\))", str(error.value))
    assert lines is not None
    code = lines.group(1)
    for old, new in replaced.items():
        code = code.replace(old, new)
    before = set(folder.iterdir())
    with contextlib.chdir(folder):
        exec(code, {"numpy": np})
    (written,) = set(folder.iterdir()) - before
    return str(written)


def test_the_advice_for_a_column_beyond_single_precision_makes_a_file_that_is_read(tmp_path: Path) -> None:
    table = np.stack([WIDE, TIMES], 1)
    with pytest.raises(ValueError, match="center them first") as error:
        load(tmp_path, table)
    read = data.load(follow_advice(tmp_path, error))
    centered = (table - table.mean(0)).astype(np.float32)
    np.testing.assert_array_equal(all_images(read), centered[np.lexsort(centered.T)])


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.TSV", "\t"), ("t.txt", " ")])
def test_the_advice_for_a_table_of_text_makes_a_file_that_is_read(tmp_path: Path, name: str, delimiter: str) -> None:
    table = RNG.normal(size=(30, 3))
    np.savetxt(tmp_path / name, table, delimiter=delimiter, header="a b c")
    with pytest.raises(ValueError, match=r"expected an \.npz or \.npy file or a folder of images, got") as error:
        data.load(str(tmp_path / name))
    read = data.load(follow_advice(tmp_path, error))
    np.testing.assert_allclose(all_images(read), table[np.lexsort(table.T)], rtol=1e-6)


def test_the_advice_for_an_archive_of_other_names_makes_a_file_that_is_read(tmp_path: Path) -> None:
    """As dSprites has it: images, labels, and a dictionary that only unpickling could read."""
    images = RNG.integers(0, 2, (30, 5, 4), np.uint8)
    others = {"metadata": np.array({"a": 1}, object), "latents_values": np.zeros((30, 6))}
    np.savez(tmp_path / "sprites.npz", imgs=images, **others)
    with pytest.raises(ValueError, match="expected one array, or arrays named train, valid and test, got") as error:
        data.load(str(tmp_path / "sprites.npz"))
    read = data.load(follow_advice(tmp_path, error, NAME="imgs"))
    assert (read.kind, read.event_shape) == (data.BINARY, (1, 5, 4))
    assert sum(map(len, (read.train, read.validation, read.test))) == 30


@pytest.mark.parametrize("size", ["small", "large"])
def test_columns_with_missing_values_are_named(tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if size == "large":
        monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
        monkeypatch.setattr(machine, "LARGE", 0)
    table = RNG.normal(size=(40, 5)).astype(np.float32)
    table[[3, 7], 1], table[9, 4] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"in train: 3 of the values, in columns 1, 4, counted from 0"):
        load(tmp_path, table)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_missing_values_of_another_split_are_called_so(tmp_path: Path, split: str) -> None:
    splits = {name: RNG.normal(size=(20, 3)) for name in ("train", "valid", "test")}
    splits[split][5, 2] = np.nan
    np.savez(tmp_path / "own.npz", **splits)
    with pytest.raises(ValueError, match=rf"NaN or infinity in {split}\w*: 1 of the values, in column 2"):
        data.load(str(tmp_path / "own.npz"))
