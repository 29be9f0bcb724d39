"""The wording of compressed images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppl_vae.reports.text import describe_sample, markdown_table, plus_minus
from ppl_vae.runs.command_results import Compression


def describe_compression(found: Compression) -> list[str]:
    """The rate of a file, the one that the bound predicts, and those of other formats, line by line."""
    K = found.num_particles
    bound = f"bound L_{K}" if K > 1 else "ELBO"
    images = f"{found.split} split, {found.num_images:,} images of {found.num_dims:,} dimensions"
    to_bits = found.num_dims * math.log(2)
    formats = ", ".join(f"{name} {find_bits_per_dim(found, size):.4f}" for name, size in found.other_formats.items())
    return [
        f"net rate {found.bits_per_dim:.4f} bits per dimension: {found.num_bytes:,} bytes with everything in the file, "
        f"without {found.initial_bytes:,} initial ones, which come back too",
        f"  {describe_sample(images, found, found.seed)}; K = {K}",
        f"  the {bound} of the same images predicts {-found.bound.mean / to_bits:.4f} "
        f"({plus_minus(found.bound)} nats per image), so the file is longer by {format_percent(found.excess, 2)}",
        f"  coding costs {format_percent(found.coding_cost, 3)}: the difference to the weights of the coded latents",
        f"  the same images in other formats: {formats} bits per dimension",
        f"  {found.num_images / found.seconds:,.0f} images per second",
    ]


def compression_table(found: Sequence[Compression]) -> str:
    """Files of several runs as a table in Markdown."""
    header = ["run", "likelihood", "images", "K", "bits per dim", "predicted", "longer by", "coding costs"]
    header += ["bytes", "initial", "PNG", "WebP", "gzip", "xz", "images / s"]
    rows = []
    for each in found:
        to_bits = each.num_dims * math.log(2)
        sizes = (each.other_formats.get(name) for name in ("PNG", "WebP", "gzip", "xz"))
        rows.append(
            [
                f"`{each.run}`",
                f"`{each.likelihood}`",
                f"{each.num_images:,} of {each.num_dims:,}",
                str(each.num_particles),
                f"{each.bits_per_dim:.4f}",
                f"{-each.bound.mean / to_bits:.4f} ± {each.bound.stderr / to_bits:.4f}",
                format_percent(each.excess, 2),
                format_percent(each.coding_cost, 3),
                f"{each.num_bytes:,}",
                f"{each.initial_bytes:,}",
                *("" if size is None else f"{find_bits_per_dim(each, size):.4f}" for size in sizes),
                f"{each.num_images / each.seconds:,.0f}",
            ]
        )
    return markdown_table(header, rows)


def find_bits_per_dim(found: Compression, num_bytes: int) -> float:
    """Bits per dimension of that many bytes."""
    return 8 * num_bytes / (found.num_images * found.num_dims)


def format_percent(share: float, digits: int) -> str:
    """A share in percent, without the sign of a rounded zero.

    >>> format_percent(-1e-7, 2)
    '0.00%'
    """
    return f"{round(100 * share, digits) + 0:.{digits}f}%"
