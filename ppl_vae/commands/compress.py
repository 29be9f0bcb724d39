"""Images of a run as a file of about -log2 p(x) bits, and back."""

from __future__ import annotations

import io
import lzma
import math
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.options import Compress, Decompress
from ppl_vae.evidence.compression import CannotDecode, Code, compress, compute_fingerprint, decompress
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.reports.text.compression import describe_compression
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.coded_file import (
    CodedFile,
    compute_digest,
    describe_versions,
    find_versions,
    read_coded_file,
    start_digest,
)
from ppl_vae.runs.command_results import Compression
from ppl_vae.runs.files import check_output, replace_file
from ppl_vae.runs.load import find_run_folder, load
from ppl_vae.runs.open import Run, Say, check_density, check_no_labels, open_run
from ppl_vae.runs.results import to_json
from ppl_vae.runtime.process import progress_bar
from ppl_vae.vae import VAE

_ELBO_PARTICLES = 16  # of the rate that the ELBO predicts
_MOST_IMAGES = 10_000  # whose rate is predicted at once
_SHEET = 32  # images in a row, and rows, of one picture in another format


def compress_run(options: Compress, *, say: Say) -> Compression:
    """Writes images of a split as a file, and its rate as a JSON file, and prints the rate.

    The rate is compared with the one that the ELBO, or the bound L_K, of the same images predicts, and with other
    formats of the same images. Refuses densities.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    check_density(run, "latents to code")
    check_no_labels(run, "code")
    if build_likelihood(run.options, run.splits.event_shape).measure != "mass":
        raise ValueError(
            f"{run.folder}: expected a likelihood that is a mass, got {run.options.likelihood}, a density: it gives "
            "numbers no code of finite length"
        )
    output = check_output(Path(options.output or run.folder / f"{options.split}.bits"))
    vae, x, K = load(run.folder), _load_pixels(run, options), options.num_particles
    started = time.monotonic()
    with progress_bar(total=len(x), unit="image", desc="compressing") as bar:
        code = compress(vae, x, num_particles=K, seed=options.seed, progress=bar.update)
    seconds = time.monotonic() - started
    coded = _make_file(options, vae, x, code)
    num_bytes = coded.write(output)
    with progress_bar(total=len(x), unit="image", desc="the rate to expect") as bar:
        S = K if K > 1 else _ELBO_PARTICLES
        found = [
            evaluate(vae, part.float(), num_particles=S, seed=options.seed, progress=bar.update)
            for part in x.split(_MOST_IMAGES)
        ]
    result = Compression(
        **vars(run.provenance),
        run=run.folder.name,
        split=options.split,
        num_images=len(x),
        num_dims=x[0].numel(),
        num_particles=K,
        seed=options.seed,
        step=runs.load_step(run.folder / runs.MODEL),
        num_bytes=num_bytes,
        initial_bytes=4 * code.initial_words,
        bits_per_dim=8 * (num_bytes - 4 * code.initial_words) / x.numel(),
        bound=Estimate.mean_of(torch.cat([part.log_evidence if K > 1 else part.elbo for part in found]), K),
        coded_bound=Estimate.mean_of(torch.from_numpy(code.log_weights), K),
        coded_nats=code.net_bits * math.log(2) / len(x),
        other_formats=measure_other_formats(x),
        seconds=seconds,
    )
    runs.write_json(output.with_name(output.name + ".json"), to_json(result))
    for line in describe_compression(result):
        say(line)
    say(f"In {output}: {num_bytes:,} bytes; ppl-vae decompress {output} gives the images back")
    return result


def decompress_file(options: Decompress, *, say: Say) -> Path:
    """Decodes a file of ``compress_run`` into an .npy file of whole numbers (N, *E), and returns its path.

    Raises ValueError, and leaves no file: the file is damaged, the run has other weights, this machine computes other
    numbers from them than the one that wrote the file, or the decoded images are not those that were compressed.
    """
    path = Path(options.file)
    coded = read_coded_file(path)
    folder = find_run_folder(options.run_dir or coded.run)
    if not folder.exists():
        raise ValueError(f"{path}: its run, {coded.run}, is not there; --run-dir says where it is now")
    vae = load(folder)
    if _digest_weights(vae) != coded.weights:
        raise ValueError(f"{path}: expected the weights that it was compressed with, got others in {folder}")
    if compute_digest(compute_fingerprint(vae, largest=coded.largest)) != coded.numbers:
        here, there = map(describe_versions, (find_versions(), coded.versions))
        raise ValueError(
            f"{path}: this machine computes other numbers from the same weights ({here}) than the one that wrote it "
            f"({there}), and cannot decode it"
        )
    output = check_output(Path(options.output or path.with_name(path.name + ".npy")))
    num_images, digest = sum(coded.sizes), start_digest()
    code = Code(coded.words, coded.initial_words, coded.sizes, np.zeros(0))
    arguments = {"largest": coded.largest, "num_particles": coded.num_particles, "seed": coded.seed}
    header = {"descr": coded.dtype.str, "fortran_order": False, "shape": (num_images, *coded.event_shape)}
    with (
        replace_file(output) as partial,
        partial.open("xb") as file,
        progress_bar(total=num_images, unit="image", desc="decompressing") as bar,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        try:
            for x in decompress(vae, code, event_shape=coded.event_shape, **arguments):
                content = x.numpy().astype(coded.dtype).tobytes()
                digest.update(content)
                file.write(content)
                bar.update(len(x))
        except CannotDecode as error:
            raise ValueError(f"{path}: {error}") from None
        if digest.digest() != coded.images:
            raise ValueError(f"{path}: the decoded images are not those that were compressed: their digest differs")
    say(f"{num_images:,} images from {path}, equal to those that were compressed, in {output}")
    return output


def _load_pixels(run: Run, options: Compress) -> Tensor:
    """Images (N, *E) of the split, in the type that they are stored in unless they are scaled to fractions."""
    stored = getattr(run.splits, options.split)
    is_scaled = run.splits.kind == data.LEVELS and run.evaluated_pixels == "none"
    dtype = torch.float32 if is_scaled else stored.dtype
    x = data.evaluation_images(run.splits, options.split, run.evaluated_pixels, seed=options.seed, dtype=dtype)
    places = data.subset(len(x), options.images)
    return x if len(places) == len(x) else x[places]


def _make_file(options: Compress, vae: VAE, x: Tensor, code: Code) -> CodedFile:
    largest = int(x.max())
    dtype = np.min_scalar_type(largest)
    return CodedFile(
        run=options.run_dir,
        versions=find_versions(),
        weights=_digest_weights(vae),
        images=compute_digest(part.numpy().astype(dtype) for part in x.split(1000)),
        numbers=compute_digest(compute_fingerprint(vae, largest=largest)),
        event_shape=tuple(x.shape[1:]),
        largest=largest,
        num_particles=options.num_particles,
        seed=options.seed,
        initial_words=code.initial_words,
        sizes=code.sizes,
        words=code.words,
    )


def _digest_weights(vae: VAE) -> bytes:
    return compute_digest(w for _, w in sorted(vae.state_dict().items()))


# --- Other formats ---


def measure_other_formats(x: Tensor) -> dict[str, int]:
    """Bytes of the same images in other formats: gzip and xz of the array, and sheets of 32 x 32 images as pictures.

    Zeros and ones are packed, eight in a byte; a table has no pictures.

    Args:
        x: (N, *E) whole numbers, of any type.
    """
    largest = int(x.max())
    is_binary, dtype = largest <= 1, torch.uint8 if largest < 256 else torch.int32
    sizes = {"gzip": 0, "xz": 0}
    gzip, xz = zlib.compressobj(9, zlib.DEFLATED, 31), lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    for part in x.split(8192):
        content = (np.packbits(part.bool().numpy()) if is_binary else part.to(dtype).numpy()).tobytes()
        sizes["gzip"] += len(gzip.compress(content))
        sizes["xz"] += len(xz.compress(content))
    sizes["gzip"] += len(gzip.flush())
    sizes["xz"] += len(xz.flush())
    if dtype == torch.uint8 and x.dim() == 4 and x.shape[1] in (1, 3):
        sizes |= {"PNG": 0, "WebP": 0}
        for part in x.split(_SHEET * _SHEET):
            sheet = _draw_sheet(part.to(dtype), is_binary)
            sizes["PNG"] += _measure_picture(sheet, "PNG", optimize=True)
            sizes["WebP"] += _measure_picture(sheet.convert("RGB"), "WebP", lossless=True, quality=100, method=6)
    return sizes


def _draw_sheet(x: Tensor, is_binary: bool) -> Image.Image:
    n, (C, H, W) = len(x), x.shape[1:]
    columns, rows = min(n, _SHEET), math.ceil(n / _SHEET)
    sheet = x.new_zeros(rows * columns, C, H, W)
    sheet[:n] = 255 * x if is_binary else x
    array = sheet.reshape(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C).numpy()
    picture = Image.fromarray(array.squeeze(-1) if C == 1 else array)
    return picture.convert("1", dither=Image.Dither.NONE) if is_binary and C == 1 else picture


def _measure_picture(picture: Image.Image, name: str, **options: int) -> int:
    file = io.BytesIO()
    picture.save(file, name, **options)
    return len(file.getvalue())
