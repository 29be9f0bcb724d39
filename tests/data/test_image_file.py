"""Data: image files that hold more than 8-bit pixels: pages, levels, opacity, channels, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vae import data

GRADIENT = np.linspace(0, 255, 30).round().astype(np.uint8).reshape(5, 6)


def encoded(pixels: np.ndarray | Image.Image, form: str = "png", **options: object) -> bytes:
    buffer = BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def folder_of(root: Path, contents: Iterable[bytes], suffix: str = "png") -> str:
    for i, content in enumerate(contents):
        (root / f"{i:02}.{suffix}").write_bytes(content)
    return str(root)


def note_on(word: str, splits: data.Splits) -> str:
    """The one note in which that word is."""
    (note,) = [note for note in splits.notes if word in note]
    return note


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path_factory.mktemp("kept")))


PHOTO = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)


PLAIN = {
    "color": [PHOTO] * 10,
    "color, and one gray": [PHOTO] * 11 + [GRADIENT],
    "opaque everywhere": [Image.fromarray(GRADIENT).convert("LA")] * 10,
}


@pytest.mark.parametrize("what", PLAIN)
def test_plain_images_have_no_notes(tmp_path: Path, what: str) -> None:
    assert data.load(folder_of(tmp_path, map(encoded, PLAIN[what]))).notes == ()


# --- Levels ---

FULL = np.linspace(0, 65_535, 30).astype(np.uint16).reshape(5, 6)
LONG_LEVELS = {
    "PNG": ("png", encoded(FULL)),
    "TIFF": ("tif", encoded(FULL, "tiff")),
    "PGM": ("pgm", b"P5 6 5 65535\n" + FULL.astype(">u2").tobytes()),
    "32 bits": ("tif", encoded(FULL.astype(np.int32), "tiff")),
    "floats": ("tif", encoded(GRADIENT.astype(np.float32), "tiff")),
}


@pytest.mark.parametrize("what", ["PNG", "TIFF", "PGM"])
def test_gray_levels_of_16_bits_become_8(tmp_path, what):
    suffix, content = LONG_LEVELS[what]
    read = data.load(folder_of(tmp_path, [content] * 10, suffix))
    assert read.train[0, 0].tolist() == np.rint(FULL / 257).tolist()
    assert "10 of 10 images" in note_on("16 bits", read)


@pytest.mark.parametrize("what", ["32 bits", "floats"])
def test_gray_levels_of_32_bits_are_refused(tmp_path, what):
    suffix, content = LONG_LEVELS[what]
    with pytest.raises(ValueError, match="32 bits have no known scale; save 8 or 16 bits"):
        data.load(folder_of(tmp_path, [content] * 10, suffix))


# --- Pages ---

FRAMES = [Image.fromarray(np.roll(GRADIENT, i)) for i in range(3)]
PAGES = {
    form: encoded(FRAMES[0], form, save_all=True, append_images=FRAMES[1:], **options)
    for form, options in {"gif": {}, "tiff": {}, "png": {}, "webp": {"lossless": True}}.items()
}


@pytest.mark.parametrize("form", PAGES)
def test_the_first_page_is_kept_and_the_number_of_pages_is_told(tmp_path: Path, form: str) -> None:
    folder_of(tmp_path, [PAGES[form]] * 4, form)
    for i in range(8):
        (tmp_path / f"one{i}.png").write_bytes(encoded(GRADIENT))
    read = data.load(str(tmp_path), color="gray")
    assert all(image[0].tolist() == GRADIENT.tolist() for image in read.train)
    assert "4 of 12 images" in note_on("pages", read)


# --- Opacity ---


def strokes(color: int, width: int) -> Image.Image:
    """Strokes of a color on a transparent ground."""
    return Image.merge("LA", [Image.new("L", (6, 5), color), Image.fromarray((20 * width < GRADIENT) * np.uint8(255))])


def test_transparent_images_are_laid_over_white_and_counted(tmp_path: Path) -> None:
    read = data.load(folder_of(tmp_path, [encoded(strokes(0, i)) for i in range(1, 8)] + [encoded(GRADIENT)] * 5))
    images = torch.cat([read.train, read.validation, read.test]).flatten(1)
    for i in range(1, 8):  # black where it is opaque, else white
        expected = torch.from_numpy(np.where(20 * i < GRADIENT, 0, 255)).flatten()
        assert (images == expected).all(1).any()
    assert "7 of 12 images" in note_on("white", read)


# --- Large images ---


def test_a_larger_image_than_pillow_allows_is_left_out_unread_and_the_limit_is_named(tmp_path: Path) -> None:
    content = bytearray(encoded(PHOTO, "bmp"))
    content[18:26] = (10_000).to_bytes(4, "little") * 2  # the width and the height
    folder_of(tmp_path, [encoded(GRADIENT)] * 10)
    (tmp_path / "scan.bmp").write_bytes(content)
    read = data.load(str(tmp_path))
    assert read.unreadable == ("scan.bmp",)
    assert "scan.bmp" in note_on("89,478,485 pixels", read)


def test_notes_are_the_same_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encoded(strokes(0, i)) for i in range(1, 8)] + [encoded(GRADIENT)] * 4
    path = folder_of(tmp_path, [*contents, PAGES["png"], encoded(GRADIENT.astype(np.float32), "tiff")])
    first = data.load(path)
    monkeypatch.setattr("ppl_vae.data.image_files.decode", None)  # nothing is decoded again
    second = data.load(path)
    assert len(first.notes) == 3
    assert second.describe() == first.describe()
    assert set(first.notes) <= {line.removeprefix(f"{first.name}: ") for line in second.describe().splitlines()}


@pytest.mark.parametrize("level", [255, 200])
def test_half_opacity_over_white_is_half_of_each(tmp_path: Path, level: int) -> None:
    image = Image.merge("LA", [Image.fromarray(GRADIENT), Image.new("L", (6, 5), level)])
    read = data.load(folder_of(tmp_path, [encoded(image)] * 10))
    expected = GRADIENT * (level / 255) + 255 * (1 - level / 255)
    assert np.abs(read.train[0, 0].numpy() - expected).max() <= 1


@pytest.mark.parametrize("form", ["png", "gif", "webp"])
def test_images_that_are_blank_over_white_are_refused(tmp_path: Path, form: str) -> None:
    content = encoded(strokes(255, 1).convert("RGBA"), form)
    with pytest.raises(ValueError, match=r"got only level 255, .*transparent"):
        data.load(folder_of(tmp_path, [content] * 10, form))


GRAY_IN_COLOR = {
    "palette": ("png", encoded(Image.fromarray(GRADIENT).convert("P"))),
    "GIF": ("gif", encoded(Image.fromarray(GRADIENT).convert("RGB").quantize(), "gif")),
    "RGB": ("png", encoded(Image.fromarray(GRADIENT).convert("RGB"))),
    "JPEG": ("jpg", encoded(Image.fromarray(GRADIENT).convert("RGB"), "jpeg")),
    "WebP": ("webp", encoded(GRADIENT, "webp")),
}


@pytest.mark.parametrize("what", GRAY_IN_COLOR)
def test_gray_images_stored_in_color_come_with_a_hint(tmp_path: Path, what: str) -> None:
    suffix, content = GRAY_IN_COLOR[what]
    path = folder_of(tmp_path, [content] * 10, suffix)
    read = data.load(path)
    assert read.event_shape[0] == 3
    assert "10 of 10 images" in note_on("--color gray", read)
    gray = data.load(path, color="gray")
    assert gray.event_shape[0] == 1
    assert "10 of 10 images" in note_on("made gray", gray)
    assert data.load(path, color="rgb").notes == ()


def test_one_image_in_color_among_gray_ones_is_told(tmp_path: Path) -> None:
    red = np.zeros((5, 6, 3), np.uint8)
    red[..., 0] = GRADIENT
    read = data.load(folder_of(tmp_path, [encoded(GRADIENT)] * 11 + [encoded(red)]))
    assert "11 of 12 images" in note_on("--color gray", read)
