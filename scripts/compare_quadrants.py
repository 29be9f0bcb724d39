"""Predict quadrants of MNIST from the others with a VAE that was not trained for it, beside Pyro's CVAE tutorial.

Pyro's tutorial (examples/cvae) trains one conditional VAE for each set of given quadrants: the lower left one, the left
half, or all but the lower right one. It reports minus its ELBO with ten particles, on gray test images, by which its
training also stopped. Here log p(x_hidden | x_observed) of one VAE, on binarized test images, is

    log sum_s w_s p(x_hidden | z_s) - log sum_s w_s,    w_s = p(x_observed | z_s) p(z_s) / q(z_s),

where half of the draws are of the guide of x_observed, and half of q(z | x). Both sums are unbiased, so what they lack
of their logarithms partly cancels. It is an estimate and no bound: where the second sum lacks more, it flatters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.commands.cli import Command, parse
from ppl_vae.runs.files import check_output
from ppl_vae.runs.options import NOT_EMPTY, POSITIVE_INTEGER, REQUIRED, CheckedOptions, option
from ppl_vae.runtime.process import run_script

if TYPE_CHECKING:
    from torch import Tensor

    from ppl_vae import VAE

# Minus the log-likelihood that Pyro's tutorial prints, by the number of given quadrants: its CVAE.
PUBLISHED = {1: 71.8, 2: 51.0, 3: 24.2}


@dataclass(frozen=True)
class CompareQuadrants(CheckedOptions):
    """Predict quadrants of MNIST's test images from the others, beside Pyro's tutorial of the CVAE."""

    run_dir: str = option(REQUIRED, "run folder, or mnist-best", NOT_EMPTY, positional=True)
    images: int = option(300, "test images, a fixed random subset", POSITIVE_INTEGER)
    num_particles: int = option(1000, "importance samples per image", POSITIVE_INTEGER)
    output: str | None = option(None, "JSON file of the results (default: printed only)", NOT_EMPTY)


def hide_quadrants(x: Tensor, given: int) -> Tensor:
    """x (N, 1, H, W) with NaN outside of 1, 2 or 3 quadrants: the lower left, the left, all but the lower right."""
    import torch

    height, width = x.shape[-2:]
    hidden = torch.zeros(height, width, dtype=torch.bool)
    hidden[height // 2 :, width // 2 :] = True
    if given < 3:
        hidden[:, width // 2 :] = True
    if given == 1:
        hidden[: height // 2] = True
    return torch.where(hidden, torch.nan, x)


def predict(vae: VAE, x: Tensor, seen: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
    """log p(x_hidden | x_observed) with S particles, and what it changed from S / 10: (N,) each, nats."""
    import torch
    from tqdm import tqdm

    from ppl_vae.evidence.missing import Observed
    from ppl_vae.evidence.proposals import DefensiveMixture
    from ppl_vae.runtime.global_state import seeded

    observed, found = Observed(vae), []
    with seeded(0, x.device), torch.no_grad():
        for whole, part in tqdm(zip(x.split(1), seen.split(1), strict=True), total=len(x), desc="images"):
            q = DefensiveMixture(observed.posterior(part), vae.posterior(whole), torch.full((1,), 0.5))
            z, p_x, log_w = observed.particles(q, part, num_particles)
            log_p_hidden = vae.likelihood(z).log_prob(whole) - p_x.log_prob(part.nan_to_num(0.0))
            tenths = ((log_w + log_p_hidden)[:, 0].chunk(10), log_w[:, 0].chunk(10))
            few = torch.stack([a.logsumexp(0) - b.logsumexp(0) for a, b in zip(*tenths, strict=True)]).mean()
            all_of_them = (log_w + log_p_hidden).logsumexp(0)[0] - log_w.logsumexp(0)[0]
            found.append(torch.stack([all_of_them, all_of_them - few]))
    result = torch.stack(found).double()
    return result[:, 0], result[:, 1]


def compare(options: CompareQuadrants) -> dict[str, Any]:
    """The results by the number of given quadrants, as they are stored."""
    from ppl_vae import data, load
    from ppl_vae.evidence.estimate import Estimate

    vae, S = load(options.run_dir), options.num_particles
    splits = data.load("mnist")
    x = data.evaluation_images(splits, "test", "dynamic")[data.subset(len(splits.test), options.images)]
    rows = {}
    for given, published in PUBLISHED.items():
        log_p, change = predict(vae, x, hide_quadrants(x, given), S)
        rows[str(given)] = {
            "negative_log_likelihood": Estimate.mean_of(-log_p, S).to_json(),
            "change": Estimate.mean_of(-change, S).to_json(),
            "published": published,
        }
    return {"run": options.run_dir, "images": len(x), "num_particles": S, "rows": rows}


def main() -> None:
    asked = parse(Command("", CompareQuadrants))
    if asked.output is not None:
        check_output(Path(asked.output))
    from ppl_vae import runs

    found = compare(asked)
    for given, row in found["rows"].items():
        mean, change = row["negative_log_likelihood"], row["change"]["mean"]
        print(
            f"{given} of 4 quadrants given: -log p(x_hidden | x_observed) {mean['mean']:.2f} ± {mean['stderr']:.2f}, "
            f"{change:+.2f} since a tenth of the particles"
        )
    if asked.output is not None:
        runs.write_json(Path(asked.output), found)


if __name__ == "__main__":
    run_script(main)
