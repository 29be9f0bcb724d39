"""The wording of a diagnosis: one line for each group of numbers, and the verdicts with their advice."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppl_vae.diagnostics.latents import ElboSplit
from ppl_vae.diagnostics.likelihood import PixelCalibration
from ppl_vae.diagnostics.measurement import Measurements
from ppl_vae.diagnostics.verdicts import Verdict, plus_minus
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.text import describe_sample
from ppl_vae.runs.options import format_flag
from ppl_vae.runs.results import Diagnosis

# What to do about each verdict; the options follow it.
_ADVICE = {
    "not settled": "Train for longer",
    "autoencoder": "Train a variational autoencoder instead",
    "decoder ignores z": "Train again with less weight on the KL",
    "over-regularized": "Train again with less weight on the KL; if beta is 1 already, train for longer",
    "under-regularized": "Train again with more weight on the KL; if beta is 1 already, train for longer",
    "dead units": "Train again with fewer latents",
    "holes": "Train again with something that brings the prior and the codes together",
    "likelihood mismatch": "Train again with a likelihood that has the shape of the pixels' noise",
    "unreliable estimate": "Evaluate again with more particles; if the guide is under-regularized, train again first",
}


def describe_diagnosis(found: Diagnosis, run: str, *, has_validation: bool) -> list[str]:
    """A diagnosis, line by line."""
    lacking = "" if has_validation or found.split != "test" else " (which has no validation split)"
    images = f"{found.numbers.num_images:,} images of the {found.split} split of {found.dataset}{lacking}"
    return [
        f"{run}: {describe_sample(images, found, found.seed)}",
        *describe_numbers(found.numbers),
        *describe_verdicts(found.verdicts),
    ]


def describe_verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    """Each verdict with its evidence, its figure, and what would change it."""
    lines = ["Verdicts:"]
    for verdict in verdicts:
        severity = f" ({verdict.severity})" if verdict.severity != "note" else ""
        lines.append(f"  {verdict.word}{severity}: {verdict.evidence}")
        if verdict.figure is not None:
            lines.append(f"    see figures/{verdict.figure}")
        if verdict.change is not None:
            lines.append(f"    {describe_advice(verdict)}")
    return lines


def describe_advice(verdict: Verdict) -> str:
    """What would change a verdict, with the options to give; empty if nothing is to change."""
    if verdict.change is None:
        return ""
    options = " ".join(f"{format_flag(name)} {_format(value)}" for name, value in verdict.change.items())
    advice = "Train again with a longer warm-up" if "warmup_epochs" in verdict.change else _ADVICE[verdict.word]
    return f"{advice}: {options}"


def _format(value: str | int | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_numbers(numbers: Measurements) -> list[str]:
    """One line for each group of numbers that this run has."""
    aggregate, pictures, noise = numbers.aggregate, numbers.pictures, numbers.noise
    terms = f"distortion -E_q[log p(x | z)] {plus_minus(numbers.reconstruction, 2, sign=-1)} nats"
    if numbers.kl is not None:
        beta = "unknown" if numbers.implied_beta is None else plus_minus(numbers.implied_beta)
        terms = f"rate KL {plus_minus(numbers.kl, 2)} nats, {terms}; the weights imply beta = {beta}"
    lines = [terms, f"latents: {numbers.active.count} of {numbers.latent_dim} are active"]
    if numbers.elbo_split is not None:
        lines.append(_describe_split(numbers.elbo_split))
    largest = max(aggregate.kolmogorov_smirnov.statistic.tolist(), default=math.nan)
    lines.append(
        f"aggregate posterior against prior: a classifier's effect {plus_minus(aggregate.classifier.effect, 2)}, "
        f"largest Kolmogorov-Smirnov distance of a latent {largest:.2f}"
    )
    if (holes := aggregate.holes) is not None:
        covered = f"covered less than {1 - holes.expected:.0%} of other images' codes are"
        lines[-1] += f", prior draws in holes ({covered}) {plus_minus(holes.share, 3)}"
    if noise is not None and not numbers.autoencoder:  # an autoencoder weighs no KL against the noise
        beta_of_run = numbers.trained_with.beta if numbers.trained_with else 1.0
        lines.append(
            f"effective noise: {noise.count_live(beta_of_run):,} of {len(noise.eigenvalues):,} directions of the data "
            f"exceed it at beta = {beta_of_run:g}, {noise.live_by_mean:,} had pixels been averaged, counted above "
            f"{noise.edge:.2f}, which independent pixels reach by chance"
        )
    lines.append(f"reconstructions vary {plus_minus(pictures.variation, 3)} of what the images do")
    if (blur := pictures.blur) is not None:
        lines[-1] += f"; sharpness against the data's {plus_minus(blur.at_mean, 3)} at the posterior's mean"
        lines.append(
            f"squared error per pixel {plus_minus(blur.error, 5)} = posterior noise "
            f"{plus_minus(blur.posterior_noise, 5)} + the rest {plus_minus(blur.bias, 5)}"
        )
    if (pixels := numbers.calibration) is not None:
        deviation = f"cumulative histogram off by up to {100 * pixels.largest_deviation:.1f} points"
        lines.append(f"pixels in p(x | z): {pixels.verdict}, {deviation}")
    if (found := numbers.importance) is not None:
        of_all = f"of the {numbers.num_images:,} " * (found.num_images < numbers.num_images)
        images = f"{found.num_images:,} {of_all}images"
        bound = f"L_{found.num_particles} = {plus_minus(found.log_likelihood, 2)} nats ({images})"
        lines.append(
            f"log p(x): {bound}; ten times the particles gained {plus_minus(found.rise, 2)}, unreliable "
            f"images {plus_minus(found.unreliable, 2)} of all"
        )
    return [f"  {line}" for line in lines]


def _describe_split(split: ElboSplit) -> str:
    information, cap = plus_minus(split.mutual_information, 2), f"cap log N = {split.cap:.2f}"
    if split.saturated:  # at the cap its spread is small, and says nothing of its error
        information = plus_minus(Estimate(split.mutual_information.mean, math.nan), 2)
        cap += ": nearly reached, so that the next is overstated"
    rest = f"KL(q(z) || p(z)) {plus_minus(split.marginal_kl, 2)}"
    if split.total_correlation is not None and split.sum_of_dimension_kl is not None:
        rest = (
            f"total correlation {plus_minus(split.total_correlation, 2)} + sum of KL(q(z_l) || p(z_l)) "
            f"{plus_minus(split.sum_of_dimension_kl, 2)}"
        )
    return f"KL = mutual information {information} ({cap}) + {rest} nats"


def describe_calibration(found: PixelCalibration) -> str:
    """The shares of pixels above the model's 90% quantile and below its 10% quantile, and the verdict, in one line."""
    return (
        f"{_percent(found.above_90_percent_quantile)} of pixels are brighter than the model's 90% quantile, "
        f"{_percent(found.below_10_percent_quantile)} darker than its 10% quantile (10% each if it were right), "
        f"cumulative histogram off by up to {100 * found.largest_deviation:.1f} points: {found.verdict}"
    )


def _percent(share: Estimate) -> str:
    return f"{plus_minus(Estimate(100 * share.mean, 100 * share.stderr), 1)}%"
