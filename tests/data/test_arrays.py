"""A user's arrays: shapes, kinds, splits, labels, the files that are refused, and files that are not read whole."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae import data
from ppl_vae.data import arrays, storage

RNG = np.random.default_rng(0)
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path_factory.mktemp("kept")
    monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every .npy file is mapped, and read a few rows at a time."""
    monkeypatch.setattr(storage, "LARGE", 0)
    monkeypatch.setattr(arrays, "BLOCK", 300)


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest) -> str:
    if request.param == "large":
        request.getfixturevalue("large")
    return request.param


def load(folder: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> data.Splits:
    """Save these arrays and load the file."""
    path = folder / ("own.npz" if array is None else "own.npy")
    np.savez(path, **arrays) if array is None else np.save(path, array)
    return data.load(str(path))


def number_images(start: int, stop: int) -> np.ndarray:
    """(N, 1) images that can be told apart: image i is the probability (i + 1) / 1024, exact in float32."""
    return (np.arange(start, stop)[:, None] + 1) / 1024


def read_numbers(images: torch.Tensor) -> list[int]:
    return [round(value * 1024) - 1 for value in images.flatten().tolist()]


# --- Kinds and shapes ---

FILES: dict[str, tuple[np.ndarray, str, type]] = {  # -> kind, as stored
    "levels in color": (RNG.integers(0, 256, (53, 5, 6, 3), np.uint8), "8-bit levels", np.uint8),
    "levels, channels first": (RNG.integers(0, 256, (53, 3, 5, 6), np.uint8), "8-bit levels", np.uint8),
    "gray levels": (RNG.integers(0, 256, (53, 5, 6), np.uint8), "8-bit levels", np.uint8),
    "gray levels, one channel first": (RNG.integers(0, 256, (53, 1, 5, 6), np.uint8), "8-bit levels", np.uint8),
    "gray levels, one channel last": (RNG.integers(0, 256, (53, 5, 6, 1), np.uint8), "8-bit levels", np.uint8),
    "zeros and ones, uint8": (RNG.integers(0, 2, (53, 9)).astype(np.uint8), "binary", np.uint8),
    "zeros and ones, int64": (RNG.integers(0, 2, (53, 9)).astype(np.int64), "binary", np.uint8),
    "bits": (RNG.integers(0, 2, (53, 9)).astype(bool), "binary", np.uint8),
    "counts, int64": (RNG.poisson(4.0, (53, 7)), "counts", np.float32),
    "counts, float64": (RNG.poisson(4.0, (53, 7)).astype(np.float64), "counts", np.float32),
    "whole numbers below 0": (RNG.integers(-3, 300, (53, 7)).astype(np.float32), "real values", np.float32),
    "probabilities, float64": (RNG.random((53, 9)), "probabilities", np.float32),
    "probabilities, other bytes first": (RNG.random((53, 9)).astype(">f4"), "probabilities", np.float32),
    "real values": (RNG.normal(size=(53, 5, 6)) * 3 + 100, "real values", np.float32),
    "real values, columns first": (np.asfortranarray(RNG.normal(size=(53, 7))), "real values", np.float32),
    "real values, other bytes first": (RNG.normal(size=(53, 7)).astype(">f8"), "real values", np.float32),
}


def split_as_documented(array: np.ndarray, dtype: type) -> dict[str, np.ndarray]:
    """by the words of the manual alone: channels first, split 80/10/10 by the frozen permutation."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3):
        array = np.moveaxis(array, -1, 1)
    array = array.astype(dtype)
    order = np.random.RandomState(777).permutation(len(array))
    return {"validation": array[order[-5:]], "test": array[order[-10:-5]], "train": array[order[:-10]]}


@pytest.mark.parametrize("what", FILES)
def test_a_file_is_what_numpy_reads_of_it_with_its_kind(tmp_path, size, what):
    array, kind, dtype = FILES[what]
    for _ in range(2):  # a large file comes from the cache the second time
        read = load(tmp_path, array) if not (tmp_path / "own.npy").exists() else data.load(str(tmp_path / "own.npy"))
        assert read.kind == kind
        assert read.sha256 == hashlib.sha256((tmp_path / "own.npy").read_bytes()).hexdigest()
        for split, images in split_as_documented(array, dtype).items():
            np.testing.assert_array_equal(getattr(read, split).numpy(), images, strict=True)
        assert data.is_mapped(read.train) == (size == "large")


@pytest.mark.usefixtures("large")
def test_a_large_file_is_read_once(tmp_path):
    """A second file of the same size and time in its place goes unseen, so it was not read."""
    path = tmp_path / "own.npy"
    before, status = load(tmp_path, FILES["real values"][0]).train.clone(), path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(data.load(str(path)).train, before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="not a readable array file"):
        data.load(str(path))


@pytest.mark.parametrize("name", ["OWN.NPY", "own.Npy", "OWN.NPZ"])
def test_the_end_of_a_files_name_may_be_upper_case(tmp_path, size, name):
    with (tmp_path / name).open("wb") as file:
        np.savez(file, x=NUMBERS) if name.lower().endswith("z") else np.save(file, NUMBERS)
    splits = data.load(str(tmp_path / name))
    assert len(splits.train) == 48
    assert data.is_mapped(splits.train) == (size == "large" and name.lower().endswith("npy"))
    assert len(data.load_images(str(tmp_path / name), splits, "none").x) == 60


@pytest.mark.parametrize("split", ["valid", "test"])
def test_floats_that_are_whole_in_train_alone_are_real_values(tmp_path, split):
    counts = RNG.poisson(4.0, (50, 6)).astype(np.float64)
    assert load(tmp_path, **{"train": counts, split: counts + 0.5}).kind == data.REAL


GRAY = RNG.integers(0, 256, (20, 4, 5)).astype(np.uint8)
BITS = RNG.integers(0, 2, (20, 4, 5)).astype(np.uint8)
FLOATS = RNG.random((20, 4, 5))


# --- Splits ---


@pytest.mark.parametrize("count", [10, 19, 1000])
@pytest.mark.parametrize("name", ["arr_0", "images", "train"])
def test_a_single_array_of_any_name_is_split_by_a_fixed_permutation(tmp_path, name, count):
    np.random.seed(1)  # noqa: NPY002 (the global generator is what must not matter)
    read = load(tmp_path, **{name: number_images(0, count)})
    tenth = count // 10
    assert [len(x) for x in (read.train, read.validation, read.test)] == [count - 2 * tenth, tenth, tenth]
    seen = [*read_numbers(read.train), *read_numbers(read.validation), *read_numbers(read.test)]
    assert sorted(seen) == list(range(count))
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(read.test, data.load(str(tmp_path / "own.npz")).test)
    if count == 1000:  # a sorted file: each split has every class
        for split in (read.validation, read.test):
            assert {number // 100 for number in read_numbers(split)} == set(range(10))


@pytest.mark.parametrize(("given", "missing"), [("test", "validation"), ("valid", "test")])
def test_a_split_that_the_file_has_is_kept_and_the_other_is_taken_from_train(tmp_path, given, missing):
    read = load(tmp_path, **{"train": number_images(0, 100), given: number_images(100, 130)})
    kept = read.test if given == "test" else read.validation
    assert read_numbers(kept) == list(range(100, 130))
    assert sorted([*read_numbers(read.train), *read_numbers(getattr(read, missing))]) == list(range(100))
    assert len(getattr(read, missing)) == 10


# --- Names of files and arrays ---

NUMBERS = RNG.integers(0, 256, (60, 4, 5), np.uint8)
KERAS = {"x_train": NUMBERS[:40], "y_train": np.arange(40), "x_test": NUMBERS[40:], "y_test": np.arange(40, 60)}
STYLES = {
    "Keras": KERAS,
    "scikit-learn": {name.replace("x_", "X_"): array for name, array in KERAS.items()},
    "the split first": {f"{name[2:]}_{name[0]}": array for name, array in KERAS.items()},
    "MedMNIST": {
        f"{split}_{what}": KERAS[f"{letter}_{split}"].reshape(-1, *shape)
        for split in ("train", "test")
        for what, letter, shape in (("images", "x", (4, 5)), ("labels", "y", (1,)))
    },
}


@pytest.mark.parametrize("style", STYLES)
def test_usual_names_of_arrays_are_understood_for_training_and_for_further_images(tmp_path, style):
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
    assert any("ignored: " in note for note in further.notes)


def test_training_images_alone_are_taken_as_further_images(tmp_path):
    path = str(tmp_path / "own.npz")
    np.savez(path, x_train=NUMBERS, y_train=np.arange(60))
    further = data.load_images(path, data.load(path), "none")
    assert further.labels is not None
    assert further.labels.tolist() == list(range(60))


# --- Labels ---


@pytest.mark.parametrize("key", ["labels", "y"])
def test_labels_follow_their_images_through_the_permutation(tmp_path, key):
    read = load(tmp_path, **{"x": number_images(0, 200), key: np.arange(200, dtype=np.uint8)[:, None]})
    for split in SPLITS:
        assert read.labels[split].tolist() == read_numbers(getattr(read, split))
        assert read.labels[split].dtype == torch.int64
    assert load(tmp_path, x=number_images(0, 200)).labels == {}


@pytest.mark.parametrize("labels", [np.arange(49), np.zeros((51, 50)), np.array(["a"] * 49), np.array(1)])
def test_labels_of_another_number_than_the_images_are_refused(tmp_path, labels):
    with pytest.raises(ValueError, match=r"own.npz: train labels: expected 50 labels, one per image, got shape"):
        load(tmp_path, x=number_images(0, 50), y=labels)


WORDS = np.array(["dog", "cat", "eel"])[np.arange(60) % 3]
IN_OTHER_FORMS = {
    "words": (WORDS, [1, 0, 2]),
    "bytes": (WORDS.astype("S"), [1, 0, 2]),
    "one-hot floats": (np.eye(3)[np.arange(60) % 3], [0, 1, 2]),
    "one-hot integers": (np.eye(3, dtype=np.uint8)[np.arange(60) % 3], [0, 1, 2]),
    "whole floats in a column": ((np.arange(60) % 3).astype(float)[:, None], [0, 1, 2]),
}


@pytest.mark.parametrize("form", IN_OTHER_FORMS)
def test_labels_in_other_forms_become_class_numbers(tmp_path, form):
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


def test_words_have_the_same_numbers_in_each_split(tmp_path):
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
    "boxes": np.zeros((60, 2, 2)),
    "two numbers": np.arange(120).reshape(60, 2),
    "objects": np.array([f"class {i % 3}" for i in range(60)], dtype=object),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_labels_that_are_no_classes_are_left_out_with_a_line(tmp_path, what):
    path = str(tmp_path / "own.npz")
    np.savez(path, x=NUMBERS, y=UNUSABLE[what])
    splits = data.load(path)
    assert (splits.labels, splits.class_names, len(splits.train)) == ({}, (), 48)
    assert "labels left out" in splits.describe() or "arrays ignored: y" in splits.describe()
    further = data.load_images(path, splits, "none")
    assert (further.labels, len(further.notes)) == (None, 1)


def test_words_that_are_no_class_of_the_training_data_are_left_out_with_a_line(tmp_path):
    path = str(tmp_path / "own.npz")
    np.savez(path, x=NUMBERS, y=WORDS)
    splits = data.load(path)
    np.savez(path, x=NUMBERS, y=np.where(WORDS == "cat", "elk", WORDS))
    further = data.load_images(path, splits, "none")
    assert further.labels is None
    assert "'elk'" in further.notes[0]


# --- Files and values that are refused ---


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def encode(name: str, **arrays: np.ndarray) -> bytes:
    """The bytes of an .npy file (one array, called array) or an .npz file."""
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, arrays["array"])
    else:
        np.savez(buffer, **arrays)
    return buffer.getvalue()


def set_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed[3, 2, 1] = value
    return changed


def encode_objects(name: str) -> bytes:
    array = np.array([{"pixels": 1}] * 20, dtype=object)
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, array, allow_pickle=True)
    else:
        np.savez(buffer, train=array)
    return buffer.getvalue()


BAD_FILES = {
    "an empty file": ("own.npy", b""),
    "half an npz": ("own.npz", encode("own.npz", train=GRAY)[:200]),
    "an npz with a flipped byte": ("own.npz", flip(encode("own.npz", train=GRAY), 300)),
    "a truncated npy": ("own.npy", encode("own.npy", array=GRAY)[:-10]),
    "text": ("own.npy", b"0 1 1 0\n1 0 0 1\n"),
    "objects": ("own.npy", encode_objects("own.npy")),
    "objects in an npz": ("own.npz", encode_objects("own.npz")),
}

NOT_FINITE = "expected finite values, got NaN or infinity in train"
BAD_ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "strings": (np.array(["a", "b"] * 10), "expected numbers, got dtype <U1"),
    "records": (np.zeros(20, dtype=[("x", "f4")]), "expected numbers, got dtype"),
    "NaN": (set_value(FLOATS, np.nan), NOT_FINITE),
    "infinity": (set_value(FLOATS, np.inf), NOT_FINITE),
    "floats beyond float32": (set_value(FLOATS, 1e39), NOT_FINITE),
    "integers below 0": (GRAY.astype(np.int64) - GRAY.min() - 1, "uint8 levels, .* got int64 from -1 .*as floats"),
    "counts beyond single precision": (GRAY.astype(np.int64) + 2**25, "counts from 0 to 16,777,216, .* got int64 from"),
    "five dimensions": (np.zeros((20, 1, 4, 5, 1), np.uint8), r"got shape \(20, 1, 4, 5, 1\) in train"),
    "no dimension": (np.array(1, np.uint8), r"got shape \(\)"),
    "images last": (np.zeros((8, 9, 3, 20), np.uint8), r"got shape \(8, 9, 3, 20\) in train; .*moveaxis"),
    "two channels": (np.zeros((20, 4, 5, 2), np.uint8), r"with 1 or 3 channels, got shape \(20, 4, 5, 2\)"),
    "no images": (np.zeros((0, 4, 5), np.uint8), "expected at least one image in every split, got an empty array"),
    "no width": (np.zeros((20, 4, 0), np.uint8), r"expected at least one pixel, got shape \(20, .*4, 0\) in train"),
    "nine images": (np.zeros((9, 4, 5), np.uint8), "expected at least 10 images to split, got 9"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_an_array_that_cannot_be_used_is_refused_at_every_size(tmp_path, size, what):
    array, message = BAD_ARRAYS[what]
    with pytest.raises(ValueError, match=f"own.npy: .*{message}"):
        load(tmp_path, array)


BAD_SPLITS = {
    "no train": ({"valid": GRAY, "test": GRAY}, r"arrays named train, valid and test, got \['valid', 'test'\]"),
    "no arrays": ({}, "expected one array, or arrays named train, valid and test, got none"),
    "images of two shapes": ({"train": GRAY, "test": GRAY[:, :, :4]}, r"one shape .*, got \[\(1, 4, 4\), \(1, 4, 5"),
    "binary train, gray test": ({"train": BITS, "test": GRAY}, "expected binary in test as in train"),
    "uint8 train, float test": ({"train": GRAY, "test": FLOATS}, "expected 8-bit levels in test as in train"),
    "NaN in test": ({"train": FLOATS, "test": set_value(FLOATS, np.nan)}, "got NaN or infinity in test: 1 of the"),
    "an empty test split": ({"train": GRAY, "test": GRAY[:0]}, "expected at least one image in every split"),
    "a test split without dimensions": ({"train": BITS, "test": np.array(1)}, r"got shape \(\)"),
}


@pytest.mark.parametrize("what", BAD_SPLITS)
def test_splits_that_do_not_belong_together_are_refused(tmp_path, what):
    arrays, message = BAD_SPLITS[what]
    with pytest.raises(ValueError, match=f"own.npz: .*{message}"):
        load(tmp_path, **arrays)


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused_without_advice_to_unpickle(tmp_path, what):
    name, content = BAD_FILES[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a readable array file") as refused:
        data.load(str(tmp_path / name))
    assert "pickle" not in str(refused.value)
    assert ("object" in str(refused.value)) == ("objects" in what)


def test_a_pickle_is_never_run(tmp_path):
    class Touches:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "was_run",))

    np.save(tmp_path / "own.npy", np.array([Touches()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="object arrays are not read"):
        data.load(str(tmp_path / "own.npy"))
    assert not (tmp_path / "was_run").exists()


# --- Sizes in headers ---


def header_of(shape: object, dtype: str = "<f8") -> bytes:
    """An .npy header that numpy would not write."""
    words = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words


LIES = {
    "terabytes": header_of((10**9, 1000)) + bytes(80),
    "a row too many": header_of((11, 1)) + bytes(80),
    "below zero": header_of((-10, -1)) + bytes(80),
    "objects": header_of((10, 1), "|O") + bytes(80),
    "no header": b"\x93NUMPY\x01\x00",
}


@pytest.mark.parametrize("container", ["npy", "npz"])
@pytest.mark.parametrize("lie", LIES)
def test_an_array_whose_header_lies_is_refused_in_one_line(tmp_path, size, lie, container):
    path = tmp_path / f"own.{container}"
    if container == "npy":
        path.write_bytes(LIES[lie])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train.npy", LIES[lie])
    with pytest.raises(ValueError, match=f"own.{container}: not a readable array file: ") as refused:
        data.load(str(path))
    assert "\n" not in str(refused.value)
    assert "allow_pickle" not in str(refused.value)


def test_an_archive_that_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "own.npz", np.zeros((100, 2**20), np.uint8))
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(storage, "get_available_memory", lambda: 10**8)
    with pytest.raises(ValueError, match=r"its arrays take 104,857,728 bytes, and 100,000,000 are available; save it"):
        data.load(str(tmp_path / "own.npz"))
