"""Where a run's test pixels lie in its own p(x | z): measured, kept in calibration.json, and said in words."""

from __future__ import annotations

from typing import Any

import pyro
import torch

from ppl_vae import data, runs
from ppl_vae.diagnostics.pixel_calibration import calibration
from ppl_vae.evidence.dequantization import LevelsPosterior, levels_of
from ppl_vae.runs.load import load
from ppl_vae.runs.opening import Run
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.progress import progress_bar
from ppl_vae.vae import VAE

CALIBRATION = "calibration.json"

_SEED = 0
_MOST_IMAGES = 1000
_NUM_DRAWS = 99


def calibrate_run(run: Run) -> dict[str, Any]:
    """``calibration`` on a fixed random 1,000 of the test images, or what calibration.json has of the same weights.

    A density of dequantized levels is calibrated as the mass that it gives to levels, and to the whole numbers beyond
    0 and 255, where no pixel can be: cut at the ends, one that puts half its mass below 0 would seem to expect black
    half of the time. Its guide sees (x + u) / 256 with a uniform u, not one of p(u | x): what is said
    of an exact posterior then holds but for what a density varies within a level.

    Returns:
        What calibration.json holds.
    """
    path = run.folder / CALIBRATION
    x = data.evaluation_images(run.splits, "test", run.evaluated_pixels)
    index = data.subset(len(x), min(run.options.images, _MOST_IMAGES))
    made = {
        "step": runs.load_step(run.folder / runs.MODEL),
        "split": "test",
        "num_images": len(index),
        "num_draws": _NUM_DRAWS,
        "seed": _SEED,
    }
    if path.exists():
        stored = runs.read_json(path)
        if made.items() <= stored.items():
            return stored
    with (
        progress_bar(total=len(index), unit="image", desc="calibration") as bar,
        seeded(_SEED, torch.device("cpu")),
        pyro.validation_enabled(False),
    ):
        vae, mass_of_levels = load(run.folder), run.pixels == "dequantized"
        if mass_of_levels:
            vae = VAE(vae.prior, vae.likelihood, LevelsPosterior(vae.posterior))
        observe = levels_of if mass_of_levels else None
        found = calibration(vae, x[index], num_draws=_NUM_DRAWS, observe=observe, progress=bar.update)
    entry = made | found.to_json()
    runs.write_json(path, entry)
    return entry


def describe_calibration(entry: dict[str, Any]) -> str:
    """The shares above the model's 90% quantile and below its 10% quantile, and the verdict, in one line."""
    return (
        f"{_percent(entry['above_90_percent_quantile'])} of pixels are brighter than the model's 90% quantile, "
        f"{_percent(entry['below_10_percent_quantile'])} darker than its 10% quantile (10% each if it were right), "
        f"cumulative histogram off by up to {100 * entry['largest_deviation']:.1f} points: {entry['verdict']}"
    )


def _percent(share: dict[str, float | None]) -> str:
    mean, stderr = share["mean"], share["stderr"]
    assert mean is not None
    return f"{100 * mean:.1f}%" if stderr is None else f"{100 * mean:.1f} ± {100 * stderr:.1f}%"
