"""MATLAB's .mat files of version 5, as far as arrays of numbers and of words go: sizes are checked before use.

Reference: The MathWorks, MAT-File Format (R2019b), chapter 1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER = 128  # bytes: words, and at the end the version and the order of bytes
_TAG = 8
_MATRIX, _COMPRESSED = 14, 15
_STORED = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
    16: "u1",
    17: "u2",
}
_CELLS, _LETTERS, _NUMBERS = 1, 4, range(6, 16)
_MOST_DEEP = 4


def read_mat(raw: bytes, *, most: int) -> dict[str, np.ndarray]:
    """{name: array} of what is an array of numbers, or of words, (n,) strings; anything else is left out.

    Args:
        raw: the file.
        most: bytes that all compressed elements together may take; what is beyond is refused before it is in memory.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    order = {b"IM": "<", b"MI": ">"}.get(raw[_HEADER - 2 : _HEADER])
    if order is None:
        raise ValueError("no .mat file of version 5")
    found, taken = {}, 0
    for kind, content in _elements(raw[_HEADER:], order):
        if kind == _COMPRESSED:
            inflated = _inflated(content, most - taken)
            if inflated is None:
                raise ValueError(f"its compressed elements take more than {most:,} bytes")
            taken += len(inflated)
            kind, content = _only(inflated, order)
        if kind == _MATRIX:
            name, value = _matrix(content, order)
            if value is not None:
                found[name] = value
    return found


def _elements(raw: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of elements that lie one after the other."""
    place = 0
    while place < len(raw):
        if len(raw) - place < _TAG:
            raise ValueError("it ends within a tag")
        kind, size = np.frombuffer(raw, f"{order}u4", 2, place).tolist()
        if kind >> 16:  # a small one: its size beside its type, its content where the size would be
            kind, size, first, after = kind & 0xFFFF, kind >> 16, place + 4, place + _TAG
        else:
            first = place + _TAG
            after = first + size if kind == _COMPRESSED else first + -(-size // 8) * 8
        if first + size > len(raw):
            raise ValueError(f"an element announces {size:,} bytes, and {len(raw) - first:,} are left")
        yield kind, raw[first : first + size]
        place = after


def _only(raw: bytes, order: str) -> tuple[int, bytes]:
    for element in _elements(raw, order):
        return element
    raise ValueError("an element is empty")


def _inflated(content: bytes, most: int) -> bytes | None:
    """None where it is more than that."""
    inflater = zlib.decompressobj()
    try:
        whole = inflater.decompress(content, most + 1)
    except zlib.error as error:
        raise ValueError(f"a compressed element is damaged: {error}") from None
    return whole if len(whole) <= most else None


def _matrix(content: bytes, order: str, deep: int = 0) -> tuple[str, np.ndarray | None]:
    """The name and the array of a matrix; None for kinds that are not read."""
    parts = list(_elements(content, order))
    if len(parts) < 3 or len(parts[0][1]) < 4 or len(parts[1][1]) % 4:
        raise ValueError("a matrix has no flags, dimensions and name")
    (_, flags), (_, dims), (_, letters), *values = parts
    kind, is_complex = int(np.frombuffer(flags, f"{order}u4", 1)[0]) & 0xFF, flags[1 if order == "<" else 2] & 0x08
    shape, name = tuple(np.frombuffer(dims, f"{order}i4").tolist()), letters.decode("latin-1")
    if kind == _CELLS and deep < _MOST_DEEP:
        cells = [_matrix(part, order, deep + 1)[1] for part_kind, part in values if part_kind == _MATRIX]
        words = ["" if cell is None or cell.dtype.kind != "U" else "".join(cell.reshape(-1).tolist()) for cell in cells]
        return name, np.array(words, dtype=np.str_)
    if (kind != _LETTERS and kind not in _NUMBERS) or is_complex or len(values) != 1 or values[0][0] not in _STORED:
        return name, None
    stored = np.dtype(f"{order}{_STORED[values[0][0]]}")
    if min(shape, default=-1) < 0 or math.prod(shape) * stored.itemsize != len(values[0][1]):
        raise ValueError(f"{name}: shape {shape} of {stored} is not {len(values[0][1]):,} bytes")
    array = np.frombuffer(values[0][1], stored).reshape(shape, order="F")
    if kind == _LETTERS and (stored.kind not in "iu" or stored.itemsize > 2):
        raise ValueError(f"{name}: expected letters in whole numbers of 8 or 16 bits, got {stored}")
    if kind == _LETTERS:
        return name, np.array([chr(code) for code in array.reshape(-1).tolist()], dtype=np.str_)
    return name, array
