"""Verdicts on a run: a pure function of its measurements, in which every threshold is a named constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ppl_vae.diagnostics.measurement import Measurements
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.training.settings import default_warmup

# A number differs from a threshold if it is beyond it by so many standard errors. Source: ours.
STDERRS = 3.0

# --- Thresholds ---

# Reconstructions that vary less than this share of what the data does are all the same. Source: ours, between 0.000 of
# collapsed runs and 0.7 of healthy ones on MNIST.
SAME_VARIATION = 0.05
# A rate below this many nats per image carries about a tenth of a bit. Source: ours.
SAME_RATE = 0.1
# The implied beta of a run trained at beta = 1 is 1; a reader should know of a factor of two. Source: ours; MNIST runs
# trained at beta = 0.01, 0.1, 1 and 20 were measured at 0.0102, 0.100, 0.999 and 20.3.
OVER_BETA, UNDER_BETA = 2.0, 0.5
# Healthy models have inactive latents: 19 of 50 are active in Burda et al. 2016 (arXiv 1509.00519), table 1, and 18 of
# 40 in a plain run on MNIST. Source of the threshold: ours.
FEWEST_ACTIVE = 0.25
# 1% of prior draws are in holes if the aggregate posterior is the prior. No trained VAE reaches that, and most draws
# of a useful one look right. Source: ours, on MNIST validation (2,000 images): 0.13 in a plain run after 10 epochs,
# 0.67 with a normal likelihood at beta = 1; 0.92 and 0.99 in runs trained at beta = 0.1 and 0.01.
MOST_HOLES = 0.8
# The cumulative histogram of the pixels' probability integral transform may be off by this much. Source: ours; the
# calibration's own verdict starts at 2 points.
MISMATCH_DEVIATION = 0.05
# An estimate has not settled if ten times the particles still gain this many nats. Source: ours, between 0.8 nats of a
# healthy MNIST run and 3.0 of one trained at beta = 0.01, both at S = 200.
MOST_RISE = 2.0
# Nor if more than this share of images is unreliable by the jackknife (``importance.UNRELIABLE_BIAS``). Source: ours.
MOST_UNRELIABLE = 0.5

# Training has not settled if its last epoch raised the validation ELBO by more nats than this. Source: ours.
SETTLED_RISE = 1.0

SEVERITIES = ("broken", "warning", "note")

Change = dict[str, str | int | float]


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Args:
        word: its name, which decides the advice.
        severity: "broken", "warning" or "note".
        evidence: the numbers with their errors, and the threshold.
        figure: the file that shows it.
        change: options of a new training, or of a new evaluation, that would change it; None if nothing is to change.
    """

    word: str
    severity: str
    evidence: str
    figure: str | None = None
    change: Change | None = None


def plus_minus(value: Estimate, digits: int | None = None, *, sign: int = 1) -> str:
    """An estimate as "mean ± stderr"; without "± stderr" if the error is unknown (NaN), "unknown" if the mean is.

    Args:
        value: the estimate.
        digits: after the point. By default the error has two significant digits; without an error there are three.
        sign: -1 to write the estimate of the negative.

    >>> plus_minus(Estimate(-81.234, 0.215))
    '-81.23 ± 0.21'
    """
    if math.isnan(value.mean):
        return "unknown"
    if digits is None:
        digits = max(0, 1 - math.floor(math.log10(value.stderr))) if value.stderr > 0 else 3
    words = f"{round(sign * value.mean, digits) + 0.0:.{digits}f}"
    return words if math.isnan(value.stderr) else f"{words} ± {value.stderr:.{digits}f}"


def verdicts(numbers: Measurements) -> list[Verdict]:
    """What stands out in a run's measurements, the worst first; only "healthy" if nothing does."""
    if (ignored := _judge_ignored_z(numbers)) is not None:  # nothing is decoded from latents, so they are not judged
        found = [_judge_autoencoder(numbers), _judge_unsettled(numbers) or ignored]
    else:
        found = [judge(numbers) for judge in _JUDGES]
    kept = [verdict for verdict in found if verdict is not None]
    if not any(verdict.severity != "note" or verdict.word == "autoencoder" for verdict in kept):
        assert numbers.kl is not None
        rate, distortion = plus_minus(numbers.kl, 2), plus_minus(numbers.reconstruction, 2, sign=-1)
        active = f"{numbers.active.count} of {numbers.latent_dim} latents active"
        words = f"nothing stands out: rate {rate}, distortion {distortion} nats, {active}"
        kept.insert(0, Verdict("healthy", "note", words))
    return sorted(kept, key=lambda verdict: SEVERITIES.index(verdict.severity))


def _judge_unsettled(numbers: Measurements) -> Verdict | None:
    """A training that has just begun looks like a collapsed one, so this verdict comes before that of an unused z."""
    trained = numbers.trained_with
    if numbers.autoencoder or trained is None or trained.epochs is None:
        return None
    if trained.last_rise is None or trained.last_rise <= SETTLED_RISE:
        return None
    return Verdict(
        "not settled",
        "warning",
        f"the last epoch still raised the validation ELBO by {trained.last_rise:.1f} nats (threshold "
        f"{SETTLED_RISE:g}): more epochs come before any other change, and the beta that the weights imply is not yet "
        "that of the training",
        "training_curves.png",
        {"epochs": 4 * trained.epochs},
    )


# --- The decoder and z ---


def _judge_autoencoder(numbers: Measurements) -> Verdict | None:
    if not numbers.autoencoder:
        return None
    return Verdict(
        "autoencoder",
        "note",
        "a deterministic guide and no prior: a plain autoencoder has reconstructions, and neither a density nor a "
        "log-likelihood; samples of the prior mean nothing (a classifier tells its codes from the prior, with an "
        f"effect of {plus_minus(numbers.aggregate.classifier.effect, 2)}: 0 if alike, 1 if apart)",
        "diagnosis-aggregate.png",
        {"posterior": "diagonal", "beta": 1.0},
    )


def _judge_ignored_z(numbers: Measurements) -> Verdict | None:
    variation, rate = numbers.pictures.variation, numbers.kl
    if not (_is_below(variation, SAME_VARIATION) or (rate is not None and _is_below(rate, SAME_RATE))):
        return None
    words = plus_minus(variation, 4)
    evidence = [f"reconstructions vary {words} of what the images do (threshold {SAME_VARIATION})"]
    if rate is not None:
        evidence.append(f"rate {plus_minus(rate, 2)} nats (threshold {SAME_RATE})")
    words = ", ".join(evidence) + _explain_ignored_z(numbers)
    return Verdict("decoder ignores z", "broken", words, "diagnosis-latents.png", _bring_back_z(numbers))


def _explain_ignored_z(numbers: Measurements) -> str:
    """What the effective noise says about it."""
    trained, noise = numbers.trained_with, numbers.noise
    if noise is None or trained is None or numbers.autoencoder:
        return ""
    live = noise.count_live(trained.beta)
    if live == 0:
        return (
            f"; the noise predicts it: at beta = {trained.beta:g} no direction of the data exceeds it (the largest "
            f"eigenvalue is {float(noise.eigenvalues[0]):.3g} in its units; independent pixels reach {noise.edge:.3g})"
        )
    return (
        f"; the noise does not predict it: at beta = {trained.beta:g} {live} directions exceed it, so look for a mean "
        f"over pixels in the loss (with which {noise.live_by_mean} would), or for training without a warm-up"
    )


def _bring_back_z(numbers: Measurements) -> Change:
    """A density for an autoencoder, beta = 1 for a larger one, else twice the default warm-up."""
    trained = numbers.trained_with
    if numbers.autoencoder:
        return {"posterior": "diagonal", "beta": 1.0}
    if trained is None or trained.beta > 1:
        return {"beta": 1.0}
    return {"warmup_epochs": 2 * default_warmup(trained.epochs or 1) or 1}


# --- The regularizer ---


def _judge_regularization(numbers: Measurements) -> Verdict | None:
    implied = numbers.implied_beta
    over = implied is not None and not is_importance_weighted(numbers) and _is_above(implied, OVER_BETA)
    if implied is None or not (over or _is_under_regularized(numbers)):
        return None
    assert numbers.kl is not None
    rate, distortion = plus_minus(numbers.kl, 2), plus_minus(numbers.reconstruction, 2, sign=-1)
    limit = OVER_BETA if over else UNDER_BETA
    trained, reason, change = numbers.trained_with, "", Change({"beta": 1.0})
    if trained is not None and UNDER_BETA <= trained.beta <= OVER_BETA:
        reason = f"; its options say beta = {trained.beta:g}, so it was trained otherwise, or not for long enough"
        change = {"beta": 1.0} if trained.epochs is None else {"epochs": 2 * trained.epochs}
    return Verdict(
        "over-regularized" if over else "under-regularized",
        "warning",
        f"the weights are stationary at beta = {plus_minus(implied)} (threshold {limit:g}): "
        f"the latents carry {rate} nats ({numbers.active.count} of {numbers.latent_dim} latents are active), for a "
        f"distortion of {distortion}{reason}",
        "diagnosis-latents.png",
        change,
    )


def is_importance_weighted(numbers: Measurements) -> bool:
    """Whether it was trained on a bound with several particles, under which the guide's widths do not imply beta."""
    trained = numbers.trained_with
    return trained is not None and trained.objective in ("iwae", "dreg") and (trained.num_particles or 1) > 1


def _is_under_regularized(numbers: Measurements) -> bool:
    """Whether the implied beta is too small; free bits at a usual beta always imply less."""
    implied, trained = numbers.implied_beta, numbers.trained_with
    if implied is None or is_importance_weighted(numbers):
        return False
    freed = trained is not None and trained.objective == "free-bits" and trained.beta >= UNDER_BETA
    return not freed and _is_below(implied, UNDER_BETA)


def _judge_dead_units(numbers: Measurements) -> Verdict | None:
    """In an over-regularized run inactive latents are a symptom, and that verdict counts them."""
    active, L, implied = numbers.active.count, numbers.latent_dim, numbers.implied_beta
    if active >= FEWEST_ACTIVE * L or (implied is not None and _is_above(implied, OVER_BETA)):
        return None
    return Verdict(
        "dead units",
        "warning",
        f"{active} of {L} latents are active (threshold {FEWEST_ACTIVE:.0%}; in a healthy published model 19 of 50): "
        "the rest cost time and nothing else, unless they collapsed in training",
        "diagnosis-latents.png",
        {"latent_dim": max(2, 2 * active)},
    )


def _judge_holes(numbers: Measurements) -> Verdict | None:
    found, effect = numbers.aggregate.holes, numbers.aggregate.classifier.effect
    if found is None or not _is_above(found.share, MOST_HOLES):
        return None
    return Verdict(
        "holes",
        "warning",
        f"{plus_minus(found.share, 3)} of prior draws are covered by the images' smoothed posteriors less than "
        f"{1 - found.expected:.0%} of other images' codes are (threshold {MOST_HOLES}, {found.expected} if the "
        "aggregate posterior were the prior); a classifier tells the two apart with an effect of "
        f"{plus_minus(effect, 2)} (0 if alike, 1 if apart)",
        "diagnosis-holes.png",
        _bring_codes_to_prior(numbers),
    )


def _bring_codes_to_prior(numbers: Measurements) -> Change:
    """beta = 1 for a smaller one, a learned prior for a fixed one, else twice beta."""
    trained = numbers.trained_with
    if _is_under_regularized(numbers) or trained is None or trained.beta < UNDER_BETA:
        return {"beta": 1.0}
    return {"prior": "flow"} if trained.prior == "standard-normal" else {"beta": 2 * trained.beta}


# --- The likelihood, and the estimate ---


def _judge_mismatch(numbers: Measurements) -> Verdict | None:
    """A binary pixel has one family of distributions, so its miscalibration is the decoder's, not the likelihood's."""
    trained, found = numbers.trained_with, numbers.calibration
    if found is None or (trained is not None and trained.likelihood == "bernoulli"):
        return None
    if found.verdict == "calibrated" or found.largest_deviation <= MISMATCH_DEVIATION:
        return None
    other = _FLEXIBLE.get(trained.data if trained else "", "normal")
    return Verdict(
        "likelihood mismatch",
        "warning",
        f"pixels are not where p(x | z) expects them: {found.verdict}; the cumulative histogram is off by up to "
        f"{100 * found.largest_deviation:.1f} points (threshold {100 * MISMATCH_DEVIATION:.0f})",
        "diagnosis-pixels.png",
        None if other == (trained and trained.likelihood) else {"likelihood": other},
    )


# A flexible likelihood for each kind of data. Source: ours.
_FLEXIBLE = {
    "8-bit levels": "discretized-logistic-mixture",
    "real values": "normal-per-pixel",
    "probabilities": "beta",
    "counts": "negative-binomial",
}


def is_reliable(rise: Estimate, unreliable: Estimate) -> bool:
    """Whether neither the rise nor the share of unreliable images is beyond its threshold by three standard errors."""
    return not _is_above(rise, MOST_RISE) and not _is_above(unreliable, MOST_UNRELIABLE)


def _judge_estimate(numbers: Measurements) -> Verdict | None:
    found = numbers.importance
    if found is None or is_reliable(found.rise, found.unreliable):
        return None
    S = found.num_particles
    gained = "with so few particles nothing tells how far it has to rise"
    if S >= 10:
        rise = plus_minus(found.rise, 2)
        gained = (
            f"ten times the particles, S = {S // 10:,} to {S:,}, still gained {rise} nats (threshold {MOST_RISE:g})"
        )
    narrow = _is_under_regularized(numbers)
    reason = "; its guide is under-regularized, and more particles help little until that is mended" * narrow
    return Verdict(
        "unreliable estimate",
        "warning",
        f"of log p(x): {gained}, and {plus_minus(found.unreliable, 2)} of the images lack more than half a nat "
        f"(threshold {MOST_UNRELIABLE}){reason}",
        "particles.png",
        {"beta": 1.0} if narrow else {"num_particles": max(5000, 10 * S)},
    )


_JUDGES: Sequence[Callable[[Measurements], Verdict | None]] = (
    _judge_autoencoder,
    _judge_unsettled,
    _judge_regularization,
    _judge_holes,
    _judge_dead_units,
    _judge_mismatch,
    _judge_estimate,
)


def _is_above(value: Estimate, threshold: float) -> bool:
    """Whether a mean is beyond a threshold by three standard errors; False if it is unknown, NaN."""
    return value.mean - (0.0 if math.isnan(value.stderr) else STDERRS * value.stderr) > threshold


def _is_below(value: Estimate, threshold: float) -> bool:
    return _is_above(Estimate(-value.mean, value.stderr), -threshold)
