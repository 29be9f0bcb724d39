"""MATLAB's files of version 5, as scipy writes them, and what is refused before memory is taken."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from ppl_vae.data.mat import read_mat

ARRAYS = {
    "bytes": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "floats": np.linspace(-1, 1, 30).reshape(2, 3, 5),
    "small": np.array([[7]], dtype=np.uint8),
    "negative": np.array([[-3, 2**40]], dtype=np.int64),
    "of_big": np.arange(5000, dtype=np.int32)[None],
}


def written(*, compressed: bool, **arrays: object) -> bytes:
    file = io.BytesIO()
    savemat(file, arrays, do_compression=compressed)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("name", ARRAYS)
def test_numbers_are_what_scipy_wrote(name: str, compressed: bool) -> None:
    read = read_mat(written(compressed=compressed, **{name: ARRAYS[name]}), most=10**6)
    assert np.array_equal(read[name], ARRAYS[name])


@pytest.mark.parametrize("compressed", [True, False])
def test_cells_of_words_are_words(compressed: bool) -> None:
    words = np.array([["ant", "a longer word", "cat"]], dtype=object)
    read = read_mat(written(compressed=compressed, names=words), most=10**6)
    assert read["names"].tolist() == ["ant", "a longer word", "cat"]


def test_a_compressed_element_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its compressed elements take more than 1,000 bytes"):
        read_mat(written(compressed=True, zeros=np.zeros(10_000)), most=1000)


def test_compressed_elements_are_together_held_to_the_limit() -> None:
    raw = written(compressed=True, **{f"zeros{i}": np.zeros(100) for i in range(10)})
    assert len(read_mat(raw, most=10_000)) == 10
    with pytest.raises(ValueError, match=r"its compressed elements take more than 5,000 bytes"):
        read_mat(raw, most=5000)


def test_letters_that_are_no_whole_numbers_are_refused() -> None:
    raw = written(compressed=False, word="abcd")
    numbers = written(compressed=False, word=np.arange(4.0)[None])
    letters = numbers.replace(struct.pack("<4I", 6, 8, 6, 0), struct.pack("<4I", 6, 8, 4, 0))  # of the class of letters
    assert read_mat(raw, most=10**6)["word"].tolist() == [*"abcd"]
    assert letters != numbers
    with pytest.raises(ValueError, match=r"^word: expected letters in whole numbers of 8 or 16 bits, got float64$"):
        read_mat(letters, most=10**6)


def test_an_element_that_announces_more_than_is_there_is_refused() -> None:
    raw = bytearray(written(compressed=False, x=np.zeros(4)))
    raw[132:136] = struct.pack("<I", 2**32 - 8)
    with pytest.raises(ValueError, match=r"an element announces 4,294,967,288 bytes, and \d+ are left"):
        read_mat(bytes(raw), most=10**6)


def test_a_shape_that_its_numbers_do_not_fill_is_refused() -> None:
    raw = written(compressed=False, x=np.zeros((2, 3)))
    changed = raw.replace(struct.pack("<2i", 2, 3), struct.pack("<2i", 2**30, 3))
    assert changed != raw
    with pytest.raises(ValueError, match=r"x: shape \(1073741824, 3\) of float64 is not 48 bytes"):
        read_mat(changed, most=10**6)


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no \.mat file of version 5"):
        read_mat(zlib.compress(bytes(1000)), most=10**6)
