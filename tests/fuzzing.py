"""Damaged files for every reader: ``python fuzzing.py FILES`` damages FILES files in all and prints what went wrong.

A reader may read a file, or raise ValueError in one line that names it. Anything else is a fault: another exception,
several lines, a flood of warnings, or more memory than ``MOST_BYTES`` beyond what the process had, at any moment, also
where the reader takes the failed allocation for a damaged file. Memory is held to that limit by RLIMIT_DATA, which
counts what is announced and not only what is touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import resource
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from functools import cache as cache_of_function
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from scipy.io import savemat
from small_run import SMALL, bars, save_bars, train_small

from ppl_vae import data, runs
from ppl_vae.commands import latents as imputation
from ppl_vae.data import binary_sets, image_files, storage
from ppl_vae.runs.certificates import read_certificates
from ppl_vae.runs.checkpoints import BlockStore, find_newest_checkpoint
from ppl_vae.runs.load import load, read_config
from ppl_vae.runs.recipes import read_reproductions
from ppl_vae.runs.results import read_per_image

MOST_BYTES = 2**30  # an image may have 89 million pixels of four bytes, and there are two images at a time
MOST_WARNINGS = 3  # of one file
HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 10**11, 0, -1)


class Reader(NamedTuple):
    """How a kind of file is read. ``damages``: further ways to damage one, beside those of bytes."""

    name: str
    suffix: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]
    damages: tuple[Callable[[random.Random, bytes], bytes], ...] = ()
    weight: int = 1
    refuses_all: bool = False  # even its seeds


# Formats of images, and how many shares of all files are of each.
PICTURES = {"png": 4, "gif": 1, "jpeg": 2, "tiff": 2, "bmp": 1, "webp": 2, "ppm": 1}

# --- Damages ---


def flip(chance: random.Random, content: bytes) -> bytes:
    """One to eight bits, more of them near the start, where headers are."""
    out = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        end = len(out) if chance.random() < 0.5 else min(len(out), 200)
        out[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(out)


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def insert(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.randbytes(chance.choice((1, 7, 300))) + content[place:]


def remove(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.choice((1, 8, 100)) :]


def noise(chance: random.Random, content: bytes) -> bytes:
    """The first bytes, by which a format is known, and then anything."""
    return content[: chance.choice((0, 6, 12))] + chance.randbytes(chance.randrange(600))


def inflate(chance: random.Random, content: bytes) -> bytes:
    """A huge number in the place of four or eight bytes, as a size, a length or an offset would stand there."""
    form = chance.choice(("<I", ">I", "<Q", ">Q"))
    number = struct.pack(form, chance.choice(HUGE) % 2 ** (8 * struct.calcsize(form)))
    place = chance.randrange(min(len(content), 400))
    return content[:place] + number + content[place + len(number) :]


def digits(chance: random.Random, content: bytes) -> bytes:
    """A huge number in the place of one that is written out, as in the headers of .npy and safetensors files."""
    found = list(re.finditer(rb"\d+", content[:4000]))
    if not found:
        return flip(chance, content)
    match = chance.choice(found)
    number = str(chance.choice(HUGE)).encode()
    return content[: match.start()] + number + content[match.end() :]


BYTES = (flip, flip, cut, insert, remove, noise, inflate, digits)

WRONG = (None, True, -1, 0, 1e308, 2**70, "", "x" * 50, "../../etc/passwd", [], {}, [[[]]], [1] * 30, {"a": {"b": []}})


def other_json(chance: random.Random, content: bytes) -> bytes:
    """A value of another type, somewhere; a key lost; or all of it something else."""
    try:
        value = json.loads(content)
    except ValueError:
        return flip(chance, content)
    if chance.random() < 0.05:
        return chance.choice((b"[" * 100_000, b"null", b"[]", b'"x"', b"{}", b"NaN", b'{"a":1e999}', b"{" + content))
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key, below in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(below, dict | list):
                collect(below)

    if isinstance(value, dict | list):
        collect(value)
    if places:
        node, key = chance.choice(places)
        if isinstance(node, dict) and chance.random() < 0.3:
            del node[key]
        else:
            node[key] = chance.choice(WRONG)
    return json.dumps(value).encode()


def other_lines(chance: random.Random, content: bytes) -> bytes:
    lines = content.splitlines()
    place = chance.randrange(len(lines))
    lines[place] = other_json(chance, lines[place])
    return b"\n".join(lines) + b"\n"


def npy_shape(chance: random.Random, content: bytes) -> bytes:
    """An .npy header that announces something else, of the right length."""
    shape = tuple(abs(chance.choice((*HUGE, 1, 8, 60))) for _ in range(chance.randint(0, 5)))
    kind = chance.choice(("<f4", "|u1", "<f8", "|O", "<U1000000", "|V8", "<M8[s]", "[('a', '<f8')]", "<c16", "|b1"))
    words = f"{{'descr': {kind if kind[0] == '[' else repr(kind)}, 'fortran_order': {chance.random() < 0.5}, "
    header = f"{words}'shape': {shape}, }}"
    whole = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(whole)) + whole + content[-chance.randrange(1, 4000) :]


def npz_bomb(chance: random.Random, content: bytes) -> bytes:
    """An .npz file whose array is all zeros: small on disk, large in memory."""
    return of_zeros(chance.choice((30, 400)))


@cache_of_function
def of_zeros(num_megabytes: int) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, train=np.zeros((num_megabytes, 2**20), np.uint8))
    return file.getvalue()


def tensor_header(chance: random.Random, content: bytes) -> bytes:
    """A safetensors header with other shapes, types and offsets, its length and the digest put right."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    what = chance.choice(("shape", "data_offsets", "dtype", "metadata"))
    if what == "shape":
        header[name]["shape"] = [abs(chance.choice(HUGE)) for _ in range(chance.randint(0, 4))]
    elif what == "data_offsets":
        header[name]["data_offsets"] = [abs(chance.choice(HUGE)) % 2**63 for _ in range(2)]
    elif what == "dtype":
        header[name]["dtype"] = chance.choice(("F64", "U8", "BF16", "I64", "F8_E4M3", "X"))
    else:
        scalars = json.loads(header["__metadata__"]["json"])
        scalars.pop("sha256", None)
        changed = other_json(chance, json.dumps(scalars).encode())
        header["__metadata__"] = {"json": changed.decode("latin-1")}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


# --- What is damaged ---


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def pictures() -> Iterator[tuple[str, bytes]]:
    gray = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9), np.uint8))
    color = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 9, 3), np.uint8))
    for form in (form.upper() for form in PICTURES):
        pages = {"save_all": True, "append_images": [gray]} if form in Image.SAVE_ALL else {}
        for image, options in ((gray, {}), (color, {}), (gray, pages)):
            file = io.BytesIO()
            with suppress(OSError, ValueError):  # some know no gray or no color
                image.save(file, form, **options)
                yield form.lower(), file.getvalue()


def tensors(run: Path, name: str) -> tuple[bytes, bytes]:
    """A file of the run with its digest, and the same as it was before there were digests."""
    stored, scalars = runs.load_tensors(run / name)
    return (run / name).read_bytes(), save(stored, metadata={"json": json.dumps(scalars)})


def readers(folder: Path) -> list[Reader]:
    """All readers, by files of a small run that is trained here."""
    images, _ = bars(40)
    rest = {"dataset": str(save_bars(folder / "bars.npz")), "epochs": 1}
    run = train_small(folder / "run", SMALL.__class__(**{**vars(SMALL), **rest}))
    return [*of_data(folder, images), *of_runs(run), *of_published()]


def of_data(folder: Path, images: np.ndarray) -> Iterator[Reader]:
    floats = images.astype(np.float32) / 3

    def load(path: Path) -> object:
        return data.load(str(path))

    arrays = (npy(images), npy(floats), npy(images.astype(np.int64) * 3), npy(np.asfortranarray(floats)))
    yield Reader("npy", ".npy", arrays, load, (npy_shape,), 3)
    archives = (npz(train=images, train_labels=np.arange(40)), npz(x_train=floats, x_test=floats[:5]))
    of_zeros(30), of_zeros(400)  # while there is memory for them
    yield Reader("npz", ".npz", archives, load, (npz_bomb,), 2)

    def load_large(path: Path) -> object:
        with mock.patch.object(storage, "LARGE", 0):
            return data.load(str(path))

    yield Reader("large npy", ".npy", arrays, load_large, (npy_shape,))

    trained_on = data.load(str(folder / "bars.npz"))
    yield Reader("further images", ".npy", arrays[:1], lambda path: data.load_images(str(path), trained_on, "none"))
    masks = (npy(np.ones((8, 8))), npy(images[:5]))
    yield Reader("mask", ".npy", masks, lambda path: imputation.read_mask(str(path), 5, (1, 8, 8)), (npy_shape,))
    for form, weight in PICTURES.items():
        files = tuple(file for other, file in pictures() if other == form)
        yield Reader(form, f".{form}", files, read_picture, (), weight)


def read_picture(path: Path) -> object:
    return image_files.read_image_files(path.parent, [path.name], image_files.ImageOptions())


def of_runs(run: Path) -> Iterator[Reader]:
    def at(name: str, read: Callable[[], object]) -> Callable[[Path], object]:
        """Reads with the file in its place in the run."""
        content = (run / name).read_bytes()

        def in_place(path: Path) -> object:
            (run / name).write_bytes(path.read_bytes())
            try:
                return read()
            finally:
                (run / name).write_bytes(content)

        return in_place

    def whole(name: str) -> tuple[bytes]:
        return ((run / name).read_bytes(),)

    said: list[str] = []
    config, evaluation, per_image = runs.CONFIG, runs.EVALUATION, runs.per_image_file("test")
    yield Reader("config", ".json", whole(config), at(config, lambda: read_config(run)), (other_json,) * 6, 2)
    yield Reader("a run by its config", ".json", whole(config), at(config, lambda: load(run)), (other_json,) * 6)
    read = at(evaluation, lambda: runs.read_evaluations(run))
    yield Reader("evaluation", ".json", whole(evaluation), read, (other_json,) * 6)
    yield Reader(
        "metrics",
        ".jsonl",
        whole(runs.METRICS) * 2,
        at(runs.METRICS, lambda: runs.read_metrics(run)),
        (other_lines,) * 6,
    )
    read = at(runs.METRICS, lambda: runs.mend_metrics(run, 10**9))
    yield Reader("mended metrics", ".jsonl", whole(runs.METRICS), read, (other_lines,) * 3)
    read = at(runs.MODEL, lambda: load(run))
    yield Reader("weights", ".safetensors", tensors(run, runs.MODEL), read, (tensor_header,) * 6, 3)
    read = at(runs.TRAINING_STATE, lambda: find_newest_checkpoint(run, say=said.append))
    yield Reader("state", ".safetensors", tensors(run, runs.TRAINING_STATE), read, (tensor_header,) * 6, 2)
    read = at(per_image, lambda: read_per_image(run, "test"))
    yield Reader("per image", ".safetensors", tensors(run, per_image), read, (tensor_header,) * 6, 2)
    yield of_block_store(run)
    rows = (Path(__file__).parents[1] / "scripts" / "results" / "reproductions.json").read_bytes()
    yield Reader("results", ".json", (rows,), read_reproductions, (other_json,) * 3)
    rows = (Path(__file__).parents[1] / "scripts/results/certificates.json").read_bytes()
    yield Reader("certificates", ".json", (rows,), read_certificates, (other_json,) * 3)


def of_block_store(run: Path) -> Reader:
    said: list[str] = []
    sizes = {"num_items": 18, "block_size": 4, "num_columns": 3}

    def open_store(path: Path) -> BlockStore:
        return BlockStore(path, {"test": {"num_particles": 5, "weights": "0" * 64}}, said.append)

    path = run / "partial.safetensors"
    begun = open_store(path)
    begun.open_stage("test", **sizes)
    begun.add(4, torch.ones(4, 3))
    begun.write()
    content = path.read_bytes()
    path.unlink()
    read = lambda path: open_store(path).open_stage("test", **sizes)  # noqa: E731
    return Reader("partial evaluation", ".safetensors", (content,), read, (tensor_header,) * 6)


def of_published() -> Iterator[Reader]:
    line = b" ".join([b"0", b"1"] * 392) + b"\n"
    yield Reader("amat", ".amat", (line * 3,), binary_sets._read_amat)
    stored = {f"{word}_data": np.zeros((3, 784), np.uint8) for word in ("train", "val", "test")}
    stored |= {f"{word}_labels": np.ones((3, 1)) for word in ("train", "val", "test")}
    stored |= {"classnames": np.array([["ant", "bee"]], dtype=object)}
    file = io.BytesIO()
    savemat(file, stored)
    published = mock.patch.object(binary_sets, "_CALTECH_MAT_MD5", hashlib.md5(file.getvalue()).hexdigest())
    yield Reader("mat", ".mat", (file.getvalue(),), published(binary_sets._read_mat))


# --- The run ---


def memory_was_short(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "t allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def fault(reader: Reader, path: Path, said: io.StringIO) -> str | None:
    """What is wrong with how the file is read; None where nothing is."""
    caught: list[warnings.WarningMessage]
    with warnings.catch_warnings(record=True) as caught, redirect_stderr(said):
        warnings.simplefilter("always")
        try:
            reader.read(path)
        except ValueError as error:
            if memory_was_short(error):
                return f"memory beyond the limit, then: {error}"
            if type(error) is not ValueError:
                return f"{type(error).__name__}: {error}"
            if not str(error) or "\n" in str(error):
                return f"not one line: {str(error)!r}"
            if not names_a_file(str(error)):
                return f"does not name the file: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    if len(caught) > MOST_WARNINGS:
        return f"{len(caught)} warnings, such as {caught[0].message}"
    return None


def names_a_file(words: str) -> bool:
    return "/" in words


def limit_memory() -> None:
    """To what the process has by now, and ``MOST_BYTES``."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    now = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))
    resource.setrlimit(resource.RLIMIT_DATA, (now + MOST_BYTES, resource.RLIM_INFINITY))


def damaged(reader: Reader, chance: random.Random) -> bytes:
    content = chance.choice(reader.seeds)
    for _ in range(chance.choice((1, 1, 1, 2))):
        damage = chance.choice((*BYTES, *reader.damages))
        try:
            content = damage(chance, content)
        except (ValueError, KeyError, TypeError, IndexError, struct.error):  # it is no such file any more
            content = flip(chance, content or b"\0")
    return content


def fuzz(reader: Reader, folder: Path, num_files: int) -> dict[str, Any]:
    """How many files were read, and the faults, with the number by which each is made again."""
    place = folder / "files" / re.sub(r"\W", "-", reader.name)
    place.mkdir(parents=True)
    path = place / f"file{reader.suffix}"
    faults, said = [], io.StringIO()
    decode = image_files.decode

    def watched(raw: bytes) -> Any:
        try:
            return decode(raw)
        except Exception as error:
            if memory_was_short(error):
                faults.append("memory beyond the limit, taken for an unreadable image")
            raise

    with mock.patch.object(image_files, "decode", watched):
        for seed in reader.seeds:
            path.write_bytes(seed)
            if not reader.refuses_all:
                reader.read(path)
        for number in range(num_files):
            path.write_bytes(damaged(reader, random.Random(f"{reader.name} {number}")))
            found = fault(reader, path, said)
            if found is not None:
                faults.append(f"{number}: {found[:300]}")
    return {"files": num_files, "faults": faults}


# --- Readers with faults, which must be found ---


def _takes_memory(path: Path) -> None:
    try:
        np.empty(10 * 2**30, np.uint8)
    except Exception as error:
        raise ValueError(f"{path}: damaged") from error


def _hides_memory(path: Path) -> None:
    try:
        torch.empty(10 * 2**30, dtype=torch.uint8)
    except Exception:
        raise ValueError(f"{path}: damaged") from None


def _raises_another(path: Path) -> None:
    raise KeyError("shape")


def _says_two_lines(path: Path) -> None:
    raise ValueError(f"{path}: damaged\nin two lines")


def _names_nothing(path: Path) -> None:
    raise ValueError("damaged")


def _warns(path: Path) -> None:
    for _ in range(10):
        warnings.warn("again", stacklevel=1)


FAULTY = (_takes_memory, _hides_memory, _raises_another, _says_two_lines, _names_nothing, _warns)


def main(num_files: int, only: list[str]) -> None:
    torch.set_num_threads(1)
    found = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["PPL_VAE_CACHE_DIR"] = str(folder / "cache")
        all_readers = [reader for reader in readers(folder) if not only or reader.name in only]
        limit_memory()
        share = -(-num_files // sum(reader.weight for reader in all_readers))
        for reader in all_readers:
            found[reader.name] = fuzz(reader, folder, share * reader.weight)
        for read in FAULTY:
            found[read.__name__] = fuzz(Reader(read.__name__, ".x", (b"12345678",), read, refuses_all=True), folder, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
