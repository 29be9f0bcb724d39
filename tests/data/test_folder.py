"""Data: folders of image files, their sizes, colors, splits and classes, and the files among them that are broken."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vae import data

SIZE = (5, 6)


def encoded(pixels: np.ndarray, suffix: str = ".png", **options: object) -> bytes:
    buffer = BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, Image.registered_extensions()[suffix], **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def fill(folder: Path, levels: Iterable[int], *, name: str = "{:03}.png", size: tuple[int, int] = SIZE) -> None:
    """One gray image of one level each, named by it."""
    for level in levels:
        write(folder / name.format(level), encoded(np.full(size, level, np.uint8)))


def levels(images: torch.Tensor) -> list[int]:
    """Of images of one level each."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def one(folder: Path, content: bytes, name: str = "own.png", **options: object) -> torch.Tensor:
    """(C, H, W) of that file, read as a folder of ten."""
    for i in range(10):
        write(folder / f"{i}{name}", content)
    return data.load(str(folder), **options).train[0]


# --- Splits ---


def all_levels(read: data.Splits) -> list[int]:
    return sorted(levels(torch.cat([read.train, read.validation, read.test])))


def test_a_folder_is_split_80_10_10_by_its_names_alone(tmp_path):
    fill(tmp_path / "a", range(50))
    fill(tmp_path / "b", reversed(range(50)))
    read = data.load(str(tmp_path / "a"))
    assert (read.kind, read.event_shape, read.train.dtype) == ("8-bit levels", (1, *SIZE), torch.uint8)
    assert [len(x) for x in (read.train, read.validation, read.test)] == [40, 5, 5]
    assert all_levels(read) == list(range(50))
    assert torch.equal(read.test, data.load(str(tmp_path / "b")).test)


@pytest.mark.parametrize("word", ["valid", "validation", "val", "Val"])
def test_folders_named_as_splits_are_splits(tmp_path, word):
    for start, folder in ((0, "train"), (20, word), (30, "test")):
        fill(tmp_path / folder, range(start, start + 4))
    read = data.load(str(tmp_path))
    assert [levels(x) for x in (read.train, read.validation, read.test)] == [
        [*range(4)],
        [*range(20, 24)],
        [*range(30, 34)],
    ]


def test_images_beside_a_test_folder_train(tmp_path):
    fill(tmp_path / "any", range(20))
    fill(tmp_path / "test", range(100, 103))
    read = data.load(str(tmp_path))
    assert levels(read.test) == [100, 101, 102]
    assert sorted([*levels(read.train), *levels(read.validation)]) == list(range(20))
    assert len(read.validation) == 2


REFUSED_SPLITS = {
    "images beside a train folder": (
        {"train": range(20), "cars": range(3)},
        "expected every image in train, valid or test, got 3 outside: cars/000.png",
    ),
    "test images alone": ({"test": range(20)}, "expected at least one image that can be read in train, got none"),
    "nine images": ({".": range(9)}, "expected at least 10 images to split, got 9"),
}


@pytest.mark.parametrize("what", REFUSED_SPLITS)
def test_a_folder_that_cannot_be_split_is_refused(tmp_path, what):
    folders, message = REFUSED_SPLITS[what]
    for name, images in folders.items():
        fill(tmp_path / name, images)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path))


def test_a_split_without_a_readable_image_is_refused(tmp_path):
    fill(tmp_path / "train", range(20))
    write(tmp_path / "test" / "broken.png", b"no image")
    with pytest.raises(ValueError, match="expected at least one image that can be read in test, got none"):
        data.load(str(tmp_path))


CLASSES = ["trains", "devices", "testudo", "valley"]


@pytest.mark.parametrize("word", CLASSES)
def test_a_class_whose_name_begins_as_a_splits_is_a_class(tmp_path, word):
    for name in ("ant", word):
        fill(tmp_path / name, range(10))
    assert data.load(str(tmp_path)).class_names == ("ant", word)


@pytest.mark.parametrize("form", ["{}/{}", "data/{}/{}", "archive/data/{}/{}/deeper", "Images 2017/{}/{}"])
def test_splits_and_classes_are_found_within_outer_folders(tmp_path, form):
    for start, split in ((0, "train"), (20, "valid"), (30, "test")):
        fill(tmp_path / form.format(split, "ant"), range(start, start + 2))
        fill(tmp_path / form.format(split, "cat"), range(start + 100, start + 102))
    read = data.load(str(tmp_path))
    assert [levels(x) for x in (read.train, read.validation, read.test)] == [
        [0, 1, 100, 101],
        [20, 21, 120, 121],
        [30, 31, 130, 131],
    ]
    assert read.class_names == ("ant", "cat")
    assert [read.labels[split].tolist() for split in ("train", "validation", "test")] == [[0, 0, 1, 1]] * 3


REFUSED_LAYOUTS = {
    "a split beside a stray image": (["data/train", "data/test", "."], "data/test, data/train"),
    "splits in each class": (["cat/train", "cat/test", "dog/train"], "cat/test, cat/train, dog/train"),
    "a test folder among the training images": (["train/cat/test", "train/dog"], "train/cat/test"),
    "years, one level down": (["images/train2017", "images/val2017"], "images/train2017, images/val2017"),
    "sizes": (["train_64x64", "valid_64x64"], "train_64x64, valid_64x64"),
    "numbers": (["train/a", "test/test1"], "test/test1"),
    "letters": (["trainA", "trainB", "testA"], "testA, trainA, trainB"),
    "several words": (["DIV2K_train_HR", "val images"], "DIV2K_train_HR, val images"),
    "doubled archives": (["seg_train/seg_train/sea", "seg_test/seg_test/sea"], "seg_test, seg_test/seg_test"),
    "other words": (["ant", "Testing", "eval", "dev"], "Testing, dev, eval"),
    "written together": (["testset", "xtrain"], "testset, xtrain"),
    "held out": (["train", "held-out"], "held-out"),
    "one folder": (["training"], "training"),
}


@pytest.mark.parametrize("what", REFUSED_LAYOUTS)
def test_any_other_layout_with_a_folder_named_like_a_split_is_refused(tmp_path, what):
    folders, named = REFUSED_LAYOUTS[what]
    for folder in folders:
        fill(tmp_path / folder, range(12))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: expected every split .*, got {named}"):
        data.load(str(tmp_path))


def test_an_archive_in_its_own_folder_keeps_its_split(tmp_path):
    for start, name in ((0, "train"), (20, "test")):
        fill(tmp_path / name / name, range(start, start + 10))
    assert levels(data.load(str(tmp_path)).test) == [*range(20, 30)]


def test_a_class_of_railroad_trains_is_a_class(tmp_path):
    """As in CIFAR-100 and in COCO."""
    for start, name in ((0, "train"), (20, "test")):
        fill(tmp_path / name / "ship", range(start, start + 10))
        fill(tmp_path / name / "train", range(start + 100, start + 110))
    read = data.load(str(tmp_path))
    assert read.class_names == ("ship", "train")
    assert sorted(levels(read.test)) == [*range(20, 30), *range(120, 130)]


def closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its mode were 000, which would not keep root out."""
    listing = os.scandir

    def refuse(path: str | os.PathLike[str] = ".") -> os._ScandirIterator[str]:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("name", ["test", "train/ant", "."])
def test_a_folder_that_cannot_be_opened_is_refused(tmp_path, name, monkeypatch):
    for folder in ("train/ant", "train/cat", "test/ant", "test/cat"):
        fill(tmp_path / folder, range(10))
    closed(tmp_path / name, monkeypatch)
    which = "the folder" if name == "." else name
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: {which} cannot be opened: Permission denied$"):
        data.load(str(tmp_path))


# --- Classes ---


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    for start, name in ((100, "cat"), (0, "ant"), (200, "dog")):
        fill(tmp_path / name, range(start, start + 10))
    read = data.load(str(tmp_path))
    assert read.class_names == ("ant", "cat", "dog")
    for split in ("train", "validation", "test"):
        assert read.labels[split].tolist() == [level // 100 for level in levels(getattr(read, split))]


# --- Sizes ---

WIDE = np.array([[10, 20, 30, 40, 50, 60, 70, 80]] * 4, np.uint8)  # (4, 8): each column has its level


def test_crop_keeps_the_middle(tmp_path):
    assert one(tmp_path / "wide", encoded(WIDE), image_size=(4, 4))[0, 0].tolist() == [30, 40, 50, 60]
    assert one(tmp_path / "tall", encoded(WIDE.T), image_size=(4, 4))[0, :, 0].tolist() == [30, 40, 50, 60]


def test_crop_keeps_the_aspect_ratio_while_it_shrinks(tmp_path):
    """The outer quarters are cut (but for what the filter still sees of them): of black, white, black white is left."""
    banded = np.zeros((20, 40), np.uint8)
    banded[:, 7:33] = 255
    assert (one(tmp_path, encoded(banded), image_size=(5, 5)) == 255).all()


def test_stretch_keeps_all_of_the_image(tmp_path):
    """Half black and half white in every row, at either size."""
    halves = np.zeros((20, 40), np.uint8)
    halves[:, 20:] = 255
    stretched = one(tmp_path, encoded(halves), image_size=(4, 4), fit="stretch").float()
    assert stretched.shape == (1, 4, 4)
    assert (stretched.mean(-1) - 127.5).abs().max() <= 1
    assert (stretched[0, :, 0] == 0).all()
    assert (stretched[0, :, 3] == 255).all()


@pytest.mark.parametrize("options", [{}, *({"image_size": (7, 9), "fit": fit} for fit in ("crop", "stretch"))], ids=str)
def test_an_image_of_the_right_size_keeps_each_pixel(tmp_path, options):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    assert one(tmp_path, encoded(pixels), **options).permute(1, 2, 0).tolist() == pixels.tolist()


def test_images_of_several_sizes_are_brought_to_one(tmp_path):
    for i in range(10):
        fill(tmp_path, [i], size=(4 + i, 12 - i))
    read = data.load(str(tmp_path), image_size=(4, 5))
    assert read.event_shape == (1, 4, 5)
    assert all_levels(read) == list(range(10))


# --- Modes and formats ---

GRAY_IMAGES = {
    "8 bits": (Image.new("L", (6, 5), 77), 77),
    "1 bit, white": (Image.new("1", (6, 5), 1), 255),
    "opaque": (Image.new("LA", (6, 5), (77, 255)), 77),
}
COLOR_IMAGES = {
    "red, green, blue": (Image.new("RGB", (6, 5), (10, 20, 30)), (10, 20, 30)),
    "opaque": (Image.new("RGBA", (6, 5), (10, 20, 30, 255)), (10, 20, 30)),
    "palette": (Image.new("RGB", (6, 5), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 20, 30)),
}


@pytest.mark.parametrize("what", GRAY_IMAGES)
def test_each_gray_image_is_one_channel_of_8_bits(tmp_path, what):
    image, level = GRAY_IMAGES[what]
    read = one(tmp_path, encoded(image))
    assert read.shape == (1, *SIZE)
    assert set(read.flatten().tolist()) == {level}


@pytest.mark.parametrize("what", COLOR_IMAGES)
def test_each_color_image_is_red_green_and_blue(tmp_path, what):
    image, channels = COLOR_IMAGES[what]
    assert [set(channel.flatten().tolist()) for channel in one(tmp_path, encoded(image))] == [{v} for v in channels]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif", ".pgm", ".PNG", ".jpg", ".webp"])
def test_each_format_is_read(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    content = encoded(np.full(SIZE, 77, np.uint8), suffix.lower(), **options)
    assert set(one(tmp_path, content, f"own{suffix}", color="gray").flatten().tolist()) == {77}


def test_color_becomes_gray_where_asked(tmp_path):
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B."""
    read = one(tmp_path, encoded(Image.new("RGB", (6, 5), (200, 100, 50))), color="gray")
    assert read.shape == (1, *SIZE)
    assert abs(read.float().mean() - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) <= 0.5


def test_the_orientation_that_a_camera_noted_is_honored(tmp_path):
    """Orientation 6 of the EXIF standard: what is stored as the first column is the top row of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((4, 8), np.uint8)
    stored[:, 0] = 255
    read = one(tmp_path, encoded(stored, exif=exif))
    assert read.shape == (1, 8, 4)
    assert (read[0, 0] == 255).all()
    assert (read[0, 1:] == 0).all()


# --- What is no image ---


def truncated(suffix: str) -> bytes:
    content = encoded(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8), suffix)
    return content[: len(content) // 2]


BROKEN = {
    "truncated.png": truncated(".png"),
    "truncated.jpg": truncated(".jpg"),
    "truncated.tif": truncated(".tif"),
    "empty.png": b"",
    "text.jpg": b"no image at all",
    "float.tif": encoded(Image.fromarray(np.full((40, 40), 0.5, np.float32)), ".tif"),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EOF\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_left_out_and_named(tmp_path, name):
    fill(tmp_path, range(10))
    write(tmp_path / "deep" / name, BROKEN[name])
    read = data.load(str(tmp_path))
    assert read.unreadable == (f"deep/{name}",)
    assert all_levels(read) == list(range(10))


def test_other_files_are_ignored_counted_and_named_by_kind(tmp_path):
    fill(tmp_path, range(10))
    for name in ("labels.csv", "0.HEIC", "1.heic", "README"):
        write(tmp_path / "about" / name, b"0,1")
    read = data.load(str(tmp_path))
    assert read.unreadable == ()
    (words,) = re.findall(r"4 other files \((.*)\) ignored", read.describe())
    assert sorted(words.split(", ")) == ["1 .csv", "1 without an extension", "2 .heic"]


NO_IMAGES = {
    "another kind of images": ({f"{i}.heic": b"ftypheic" for i in range(12)}, r"got 12 other files \(12 \.heic\)"),
    "broken images": ({"a.png": b"", "b.png": b""}, r"got 2 that cannot be read: a.png, b.png"),
    "nothing": ({}, "got an empty folder"),
    "text": ({"notes.txt": b""}, r"got 1 other file \(1 \.txt\)"),
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_a_folder_without_readable_images_is_refused(tmp_path, what):
    files, message = NO_IMAGES[what]
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: expected images.*, {message}"):
        data.load(str(tmp_path))


# --- The checksum ---


def test_the_checksum_is_of_names_and_bytes_wherever_the_folder_is(tmp_path):
    fill(tmp_path / "a", range(10))
    expected = hashlib.sha256()
    for path in sorted((tmp_path / "a").iterdir()):
        content = path.read_bytes()
        expected.update(path.name.encode() + b"\0" + str(len(content)).encode() + b"\0" + content)
    assert data.load(str(tmp_path / "a")).sha256 == expected.hexdigest()
    (tmp_path / "a").rename(tmp_path / "b")
    assert data.load(str(tmp_path / "b")).sha256 == expected.hexdigest()
    (tmp_path / "b" / "003.png").rename(tmp_path / "b" / "0030.png")
    assert data.load(str(tmp_path / "b")).sha256 != expected.hexdigest()


def test_each_image_has_the_name_of_its_file(tmp_path):
    """Also where it comes from the cache, and beside a file that is left out."""
    fill(tmp_path, range(30))
    write(tmp_path / "015x.png", b"no image")
    for _ in range(2):
        read = data.load(str(tmp_path))
        for split in ("train", "validation", "test"):
            assert [int(name[:3]) for name in read.names[split]] == levels(getattr(read, split))
