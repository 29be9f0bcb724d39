"""New images from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae.commands.options import Sample
from ppl_vae.evidence.moments import sample_latents
from ppl_vae.reports.display import choose_display
from ppl_vae.reports.run_figures import samples_figure
from ppl_vae.reports.text.captions import NOT_TRAINED_ON_PRIOR
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.fit_arguments import find_device
from ppl_vae.runs.open import Say, load_evaluated_vae, open_run_or_export
from ppl_vae.runs.outputs import make_output_folder, write_arrays, write_figure, write_picture
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.vae import VAE

_MOST_DRAWN = 256  # in samples.png


class Samples(NamedTuple):
    """Draws z ~ p(z), and for each the mean and a draw of p(x | z).

    Args:
        z: (N, L).
        mean: (N, *E) E[x | z].
        images: (N, *E) x ~ p(x | z).
    """

    z: Tensor
    mean: Tensor
    images: Tensor


@serialize_threads()
@torch.no_grad()
def sample(vae: VAE, num_samples: int) -> Samples:
    """Draws z ~ p(z), x ~ p(x | z) by torch's global generator, in passes that fit into memory."""
    z = sample_latents(vae.prior(), num_samples)
    one = vae.likelihood(z[:1]).mean
    samples = Samples(z, *(one.new_empty((num_samples, *one.shape[1:])) for _ in range(2)))
    chunk = images_per_pass(one, vae.likelihood)
    for part, mean, images in zip(*(values.split(chunk) for values in samples), strict=True):
        decoded = vae.likelihood(part)
        mean.copy_(decoded.mean)
        images.copy_(decoded.sample())
    return samples


def sample_run(options: Sample, *, say: Say) -> Path:
    """Draws images from a run: samples.npz (``Samples``), samples.png, and images/0000.png and so on.

    The single pictures are of the means, in 8 bits: what the decoder is sure of, without the noise of single pixels
    that p(x | z) draws independently. The draws themselves are in samples.npz. Tables have no pictures. An export needs
    no data for it.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, or a folder that holds something.
    """
    run = open_run_or_export(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    place = find_device(options.device)
    vae = load_evaluated_vae(run).to(place)
    if is_autoencoder(run.options):
        say(f"No samples of a model: these are decoded draws of N(0, I), {NOT_TRAINED_ON_PRIOR}.")
    folder = make_output_folder(options.output, run.folder / "samples")
    with seeded(options.seed, place):
        samples = Samples(*(values.cpu() for values in sample(vae, options.num_samples)))
    write_arrays(folder / "samples.npz", samples._asdict())
    say(f"{options.num_samples:,} samples, z ~ p(z), x ~ p(x | z), seed {options.seed}, in {folder}:")
    say("  samples.npz: z, mean E[x | z], and images x ~ p(x | z)")
    if len(run.splits.event_shape) == 1:
        say("The data is a table, (N, D): there are no pictures.")
        return folder
    display = choose_display(run, None if len(run.splits.train) else samples.images)
    shown = Samples(*(values[:_MOST_DRAWN] for values in samples))
    figure = samples_figure(display, shown.mean, shown.images, autoencoder=is_autoencoder(run.options))
    write_figure(folder / "samples.png", figure)
    _write_pictures(folder / "images", display.levels(samples.mean))
    first = f" of the first {_MOST_DRAWN}" if options.num_samples > _MOST_DRAWN else ""
    say(f"  samples.png: means and images{first}; images/: a picture of each mean")
    return folder


def _write_pictures(folder: Path, levels: NDArray[np.uint8]) -> None:
    """Writes 0000.png and so on, and removes pictures of an earlier call that drew more."""
    folder.mkdir(exist_ok=True)
    digits = max(4, len(str(len(levels) - 1)))
    names = {f"{i:0{digits}d}.png" for i in range(len(levels))}
    for old in folder.glob("[0-9]*.png"):
        if old.name not in names and old.stem.isdigit():
            old.unlink()
    for name, image in zip(sorted(names), levels, strict=True):
        write_picture(folder / name, image)
