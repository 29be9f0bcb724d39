"""Data: image files that hold more than 8-bit pixels: pages, levels, opacity, channels, and what is said of them."""

from __future__ import annotations

import struct
import zlib
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


def tiff(levels: np.ndarray, *, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A gray TIFF file by the words of TIFF 6.0: little-endian, one strip, without compression."""
    height, width = levels.shape
    if bits == 12:  # two levels in three bytes, the rows padded to whole bytes
        rows = ["".join(f"{level:012b}" for level in row) for row in levels.tolist()]
        strip = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    else:
        strip = levels.astype(f"<{'iu'[sample_format == 1]}{bits // 8}").tobytes()
    entries = [
        *((256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)),
        *((277, 3, 1), (278, 4, height), (279, 4, len(strip)), (339, 3, sample_format)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(entries)) + directory + bytes(4)


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
    "PNG": ("png", encoded(FULL), FULL / 65_535),
    "TIFF": ("tif", tiff(FULL, bits=16), FULL / 65_535),
    "TIFF, white is zero": ("tif", tiff(FULL, bits=16, photometric=0), 1 - FULL / 65_535),
    "TIFF of 12 bits": ("tif", tiff(FULL // 16, bits=12), (FULL // 16) / 4095),
    "JPEG 2000": ("jp2", encoded(FULL, "jpeg2000"), FULL / 65_535),
    "PGM": ("pgm", b"P5 6 5 65535\n" + FULL.astype(">u2").tobytes(), FULL / 65_535),
    "PGM of 12 bits": ("pgm", b"P5 6 5 4095\n" + (FULL // 16).astype(">u2").tobytes(), (FULL // 16) / 4095),
}


@pytest.mark.parametrize("what", LONG_LEVELS)
def test_levels_of_a_known_scale_become_256_and_the_reduction_is_told(tmp_path: Path, what: str) -> None:
    suffix, content, expected = LONG_LEVELS[what]
    bits = 12 if "12" in what else 16
    read = data.load(folder_of(tmp_path, [content] * 10, suffix))
    assert read.train[0, 0].tolist() == np.floor(255 * expected + 0.5).tolist()
    note = note_on(f"{bits} bits", read)
    assert "10 of 10 images" in note
    assert f"{2**bits:,} levels" in note
    assert "256 levels" in note


COLORS = np.stack([FULL, FULL[::-1], FULL // 2], 2)


LONG_COLORS = {
    "PNG": ("png", None),
    "PPM": ("ppm", b"P6 6 5 65535\n" + COLORS.astype(">u2").tobytes()),
    "SGI": (
        "sgi",
        struct.pack(">HBBHHHHII", 474, 0, 2, 3, 6, 5, 3, 0, 65_535)
        + bytes(492)
        + COLORS[::-1].transpose(2, 0, 1).astype(">u2").tobytes(),
    ),
}


def png_of_16_bits(colors: np.ndarray) -> bytes:
    """By the words of the PNG specification: Pillow writes no color of 16 bits."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = colors.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colors)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("what", LONG_COLORS)
def test_colors_of_16_bits_become_8_and_the_reduction_is_told(tmp_path: Path, what: str) -> None:
    suffix, content = LONG_COLORS[what]
    read = data.load(folder_of(tmp_path, [content or png_of_16_bits(COLORS)] * 10, suffix))
    assert np.abs(read.train[0].permute(1, 2, 0).numpy() - COLORS / 257).max() <= 1
    assert "10 of 10 images" in note_on("65,536 levels", read)


NO_SCALE = {
    "12 bits in a PNG of 16": ("png", encoded((FULL // 16).astype(np.uint16)), "above 4,095"),
    "12 bits in a TIFF of 16, white is zero": ("tif", tiff(FULL // 16, bits=16, photometric=0), "above 4,095"),
    "10 bits in a TIFF of 16": ("tif", tiff(FULL // 64, bits=16), "above 1,023"),
    "12 bits in colors of 16": ("png", png_of_16_bits(COLORS // 16), "above"),
    "integers of 32 bits": ("tif", tiff(GRADIENT, bits=32), "32-bit levels have no known scale"),
    "signed integers of 32 bits": ("tif", tiff(GRADIENT, bits=32, sample_format=2), "signed and 32-bit levels"),
    "signed integers of 16 bits": ("tif", tiff(FULL // 2, bits=16, sample_format=2), "signed and 32-bit levels"),
    "floats": ("tif", encoded(GRADIENT.astype(np.float32), "tiff"), "floating-point levels have no known scale"),
}


@pytest.mark.parametrize("what", NO_SCALE)
def test_levels_without_a_known_scale_are_refused(tmp_path: Path, what: str) -> None:
    suffix, content, reason = NO_SCALE[what]
    with pytest.raises(ValueError, match=reason):
        data.load(folder_of(tmp_path, [content] * 10, suffix))


def test_dark_images_of_16_bits_beside_bright_ones_keep_their_scale(tmp_path: Path) -> None:
    read = data.load(folder_of(tmp_path, [encoded(np.full((5, 6), 257 * 7 * i, np.uint16)) for i in range(20)]))
    images = torch.cat([read.train, read.validation, read.test])
    assert sorted(images[:, 0, 0, 0].tolist()) == [7 * i for i in range(20)]


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
    assert "4 of 12 images (12 in all; 00" in note_on("pages", read)


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


def test_a_large_scan_is_left_out_and_the_limit_is_named(tmp_path: Path) -> None:
    """A4 at 600 dots per inch, in black and white."""
    page = Image.new("1", (4960, 7016), 1)
    scan = encoded(page, "tiff", compression="group4")
    folder_of(tmp_path, [encoded(GRADIENT)] * 10)
    (tmp_path / "scan.tif").write_bytes(scan)
    read = data.load(str(tmp_path))
    assert read.unreadable == ("scan.tif",)
    assert "scan.tif" in note_on("8,388,608 pixels", read)


def test_a_folder_of_large_scans_is_refused_by_the_limit(tmp_path: Path) -> None:
    scan = encoded(Image.new("1", (4960, 7016), 1), "tiff", compression="group4")
    with pytest.raises(ValueError, match=r"got 10 that cannot be read: .*8,388,608 pixels .* 200 per byte"):
        data.load(folder_of(tmp_path, [scan] * 10, "tif"), image_size=(64, 64))


def test_notes_are_the_same_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encoded(strokes(0, i)) for i in range(1, 8)] + [encoded(FULL)] * 4
    path = folder_of(tmp_path, [*contents, PAGES["png"], encoded(GRADIENT.astype(np.float32), "tiff")])
    first = data.load(path)
    monkeypatch.setattr("ppl_vae.data.folder.decode", None)  # nothing is decoded again
    second = data.load(path)
    assert len(first.notes) == 4
    assert second.describe() == first.describe()
    assert set(first.notes) <= {line.removeprefix(f"{first.name}: ") for line in second.describe().splitlines()}


def test_one_file_of_many_pages_is_too_few_and_the_pages_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected at least 10 images to split, got 1; .*several pages or frames"):
        data.load(folder_of(tmp_path, [PAGES["tiff"]], "tif"))


def test_a_transparent_level_of_16_bits_is_white_and_counted(tmp_path: Path) -> None:
    content = encoded(FULL, transparency=int(FULL[0, 0]))
    read = data.load(folder_of(tmp_path, [content] * 10))
    assert read.train[0, 0, 0, 0] == 255
    assert read.train[0, 0].flatten()[1:].tolist() == np.floor(FULL.flatten()[1:] / 257 + 0.5).tolist()
    assert "10 of 10 images" in note_on("white", read)


@pytest.mark.parametrize("level", [255, 200])
def test_half_opacity_over_white_is_half_of_each(tmp_path: Path, level: int) -> None:
    image = Image.merge("LA", [Image.fromarray(GRADIENT), Image.new("L", (6, 5), level)])
    read = data.load(folder_of(tmp_path, [encoded(image)] * 10))
    expected = GRADIENT * (level / 255) + 255 * (1 - level / 255)
    assert np.abs(read.train[0, 0].numpy() - expected).max() <= 1


@pytest.mark.parametrize("split", ["all", "test"])
@pytest.mark.parametrize("form", ["png", "gif", "webp"])
def test_a_split_that_is_blank_over_white_is_refused(tmp_path: Path, split: str, form: str) -> None:
    for word in ("train", "test"):
        image = strokes(255, 1) if split in ("all", word) else Image.fromarray(GRADIENT)
        (tmp_path / word).mkdir()
        folder_of(tmp_path / word, [encoded(image.convert("RGBA"), form)] * 10, form)
    with pytest.raises(ValueError, match=f"only level 255 in {'train' if split == 'all' else 'test'}, .*transparent"):
        data.load(str(tmp_path))


def test_images_that_show_nothing_are_counted(tmp_path: Path) -> None:
    contents = [encoded(strokes(255 * (i % 2), 1)) for i in range(40)]
    read = data.load(folder_of(tmp_path, contents))
    assert "40 of 40 images" in note_on("white", read)
    assert "20 of 40 images" in note_on("show nothing", read)


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
    assert (gray.event_shape[0], gray.notes) == (1, ())
    assert data.load(path, color="rgb").notes == ()


def test_one_image_in_color_among_gray_ones_is_told(tmp_path: Path) -> None:
    red = np.zeros((5, 6, 3), np.uint8)
    red[..., 0] = GRADIENT
    read = data.load(folder_of(tmp_path, [encoded(GRADIENT)] * 11 + [encoded(red)]))
    assert "11 of 12 images" in note_on("--color gray", read)


def test_further_channels_of_a_tiff_file_are_told(tmp_path: Path) -> None:
    """Red, green, blue and near infrared, without a word on what the fourth is."""
    bands = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    content = encoded(Image.fromarray(bands, "RGBA"), "tiff").replace(
        struct.pack("<HHII", 338, 3, 1, 2), struct.pack("<HHII", 338, 3, 1, 0)
    )
    read = data.load(folder_of(tmp_path, [content] * 10, "tif"))
    assert read.train[0].permute(1, 2, 0).tolist() == bands[..., :3].tolist()
    assert "10 of 10 images" in note_on("channels", read)
