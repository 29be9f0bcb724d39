"""Where a run's test pixels lie in its own p(x | z): measured, and kept in calibration.json."""

from __future__ import annotations

import pyro
import torch

from ppl_vae import data, runs
from ppl_vae.diagnostics.pixel_calibration import calibrate_pixels
from ppl_vae.evidence.dequantization import LevelsPosterior, levels_of
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run
from ppl_vae.runs.results import RunCalibration, from_json, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.progress import progress_bar
from ppl_vae.vae import VAE

CALIBRATION = "calibration.json"

_SEED = 0
_MOST_IMAGES = 1000
_NUM_DRAWS = 99


def calibrate_run(run: Run) -> RunCalibration:
    """``calibrate_pixels`` on 1,000 fixed random test images, or the stored result for the same weights.

    A density of dequantized levels is calibrated as the mass that it gives to levels, and to the whole numbers beyond 0
    and 255, where no pixel can be. If it were cut at the ends, a density with half its mass below 0 would seem to
    expect black half of the time. Its guide sees (x + u) / 256 with a uniform u, not a u from p(u | x), so the result
    for an exact posterior is uniform only up to how the density varies within a level.
    """
    path = run.folder / CALIBRATION
    x = data.evaluation_images(run.splits, "test", run.evaluated_pixels)
    index = data.subset(len(x), min(run.options.images, _MOST_IMAGES))
    identity = {
        "step": runs.load_step(run.folder / runs.MODEL),
        "split": "test",
        "num_images": len(index),
        "num_draws": _NUM_DRAWS,
        "seed": _SEED,
    }
    if path.exists() and identity.items() <= (stored := runs.read_json(path)).items():
        return from_json(RunCalibration, stored)
    with (
        progress_bar(total=len(index), unit="image", desc="calibration") as bar,
        seeded(_SEED, torch.device("cpu")),
        pyro.validation_enabled(False),
    ):
        vae, transform = load(run.folder), None
        if run.pixels == "dequantized":
            vae, transform = VAE(vae.prior, vae.likelihood, LevelsPosterior(vae.posterior)), levels_of
        found = calibrate_pixels(vae, x[index], num_draws=_NUM_DRAWS, transform=transform, progress=bar.update)
    entry = to_json(found) | identity
    runs.write_json(path, entry)
    return from_json(RunCalibration, entry)
