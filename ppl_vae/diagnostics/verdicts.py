"""What the numbers of a run mean, in plain words: a pure function of them, each threshold a named constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ppl_vae.diagnostics.values import plus_minus
from ppl_vae.runs.options import default_warmup

# A number is called different from a threshold where it lies beyond it by so many standard errors. Source: ours.
STDERRS = 3.0

# --- Thresholds ---

# Reconstructions that vary less than this share of what the data does are "all the same". Source: ours, between 0.000
# of collapsed runs and 0.7 of healthy ones on MNIST.
SAME_VARIATION = 0.05

# A rate below this many nats an image tells about a tenth of a bit of it. Source: ours.
SAME_RATE = 0.1

# The implied beta of a run trained at beta = 1 is 1; a factor of two either way is what a reader should know of.
# Source: ours; MNIST runs trained at beta = 0.01, 0.1, 1 and 20 were measured at 0.0102, 0.100, 0.999 and 20.3.
OVER_BETA, UNDER_BETA = 2.0, 0.5

# Healthy models have inactive latents: 19 of 50 are active in Burda et al. 2016 (arXiv 1509.00519), table 1, and 18 of
# 40 in a plain run on MNIST. Source of the cut: ours.
FEWEST_ACTIVE = 0.25

# 1% of prior draws are in holes where the aggregate posterior is the prior. No trained VAE reaches that, and most draws
# of a useful one look right. Source: ours, on MNIST validation (2,000 images): 0.13 in a plain run after 10 epochs,
# 0.67 under a normal likelihood at beta = 1; 0.92 and 0.99 in runs trained at beta = 0.1 and 0.01.
MOST_HOLES = 0.8

# The cumulative histogram of pixels' probability integral transform may be off by so much. Source: ours; the
# calibration's own verdict speaks from 2 points.
MISMATCH_DEVIATION = 0.05

# Ten times the particles still gain so many nats: the estimate has not settled. Source: ours, between 0.8 nats of a
# healthy MNIST run and 3.0 of one trained at beta = 0.01, both at S = 200.
MOST_RISE = 2.0

# Or more than this share of images is unreliable by the jackknife (``importance.UNRELIABLE_BIAS``). Source: ours.
MOST_UNRELIABLE = 0.5

SEVERITIES = ("broken", "warning", "note")

_NORMAL = "standard-normal"

TRAIN, EVALUATE = "train_svi.py", "evaluate_log_likelihood.py"


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Args:
        word: its name.
        severity: "broken", "warning" or "note".
        evidence: the numbers with their errors, and the threshold.
        figure: the file that shows it.
        change: options of ``script`` that would change it; None where nothing is to be changed.
        script: whose command line that is.
    """

    word: str
    severity: str
    evidence: str
    figure: str | None = None
    change: Mapping[str, Any] | None = None
    script: str = TRAIN

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return asdict(self)


Numbers = Mapping[str, Any]


def verdicts(numbers: Numbers) -> list[Verdict]:
    """What stands out in a run's numbers, the worst first; "healthy" alone where nothing does.

    Args:
        numbers: as ``commands.diagnosis_numbers.measure`` returns them.
    """
    if ignored := _ignores_z(numbers):
        found = [_autoencoder(numbers), ignored]  # what latents do that nothing is decoded from says nothing
    else:
        found = [judge(numbers) for judge in _JUDGES]
    kept = [verdict for verdict in found if verdict is not None]
    if not any(verdict.severity != "note" or verdict.word == "autoencoder" for verdict in kept):
        kept.insert(0, _healthy(numbers))
    return sorted(kept, key=lambda verdict: SEVERITIES.index(verdict.severity))


def _healthy(numbers: Numbers) -> Verdict:
    rate, distortion = plus_minus(numbers["kl"], 2), plus_minus(numbers["reconstruction"], 2, sign=-1)
    active, L = numbers["active"]["count"], numbers["latent_dim"]
    text = f"nothing stands out: rate {rate}, distortion {distortion} nats, {active} of {L} latents active"
    return Verdict("healthy", "note", text)


# --- The decoder and z ---


def _autoencoder(numbers: Numbers) -> Verdict | None:
    if not numbers["autoencoder"]:
        return None
    effect = numbers["aggregate"]["classifier"]["effect"]
    return Verdict(
        "autoencoder",
        "note",
        "a deterministic guide and no prior: a plain autoencoder has reconstructions, and neither a density nor a "
        f"log-likelihood; samples of the prior mean nothing (a classifier tells its codes from the prior, with an "
        f"effect of {plus_minus(effect, 2)}: 0 if alike, 1 if apart)",
        "diagnosis-aggregate.png",
        {"posterior": "diagonal", "beta": 1.0},
    )


def _ignores_z(numbers: Numbers) -> Verdict | None:
    variation, rate = numbers["pictures"]["variation"], numbers["kl"]
    same = variation is not None and _below(variation, SAME_VARIATION)
    silent = rate is not None and _below(rate, SAME_RATE)
    if not (same or silent):
        return None
    told = []
    if variation is not None:
        told.append(
            f"reconstructions vary {plus_minus(variation, 4)} of what the images do (threshold {SAME_VARIATION})"
        )
    if rate is not None:
        told.append(f"rate {plus_minus(rate, 2)} nats (threshold {SAME_RATE})")
    why, change = _why_ignored(numbers)
    return Verdict(
        "decoder ignores z",
        "broken",
        ", ".join(told) + why,
        "diagnosis-pictures.png" if same else "diagnosis-latents.png",
        change,
    )


def _why_ignored(numbers: Numbers) -> tuple[str, dict[str, Any]]:
    """What the effective noise says of it, and what to change."""
    trained = numbers.get("trained_with") or {}
    beta, noise = trained.get("beta"), numbers["noise"]
    if numbers["autoencoder"]:
        return "", {"posterior": "diagonal", "beta": 1.0}
    if noise is None or beta is None:
        return "", _against_collapse(trained)
    edge = noise.get("edge") or 0.0
    live = sum(value > max(beta, edge) for value in noise["eigenvalues"])
    if live == 0:
        by_chance = f", and independent pixels reach {edge:.3g}" if edge > beta else ""
        words = (
            f"; the noise predicts it: at beta = {beta:g} no direction of the data exceeds it (the largest eigenvalue "
            f"is {_largest(noise):.3g} in its units{by_chance})"
        )
        return words, _with_warmup({"beta": 1.0}, trained) if beta > 1 else _other_likelihood(trained)
    words = (
        f"; the noise does not predict it: at beta = {beta:g} {live} directions exceed it, so look for a mean over "
        f"pixels in the loss (with which {noise['live_by_mean']} would), or for training without a warm-up"
    )
    return words, _against_collapse(trained)


def _against_collapse(trained: Numbers) -> dict[str, Any]:
    """Free bits, which need the KL of each latent in closed form; else a warm-up of twice the default's epochs."""
    if trained.get("prior", _NORMAL) == _NORMAL and trained.get("posterior", "diagonal") == "diagonal":
        return {"objective": "free-bits"}
    return {"warmup_epochs": 2 * default_warmup(trained.get("epochs", 1)) or 1}


def _with_warmup(change: dict[str, Any], trained: Numbers) -> dict[str, Any]:
    """And the default warm-up, where the run had none: without one latents collapse early, and stay collapsed."""
    if trained.get("warmup_epochs") != 0 or "epochs" not in trained:
        return change
    return change | {"warmup_epochs": default_warmup(trained["epochs"])}


def _largest(noise: Numbers) -> float:
    return max(noise["eigenvalues"], default=0.0)


# --- The regularizer ---


def _regularization(numbers: Numbers) -> Verdict | None:
    implied = numbers["implied_beta"]
    if implied is None or is_importance_weighted(numbers):
        return None
    over, under = _above(implied, OVER_BETA), _is_under(numbers)
    if not (over or under):
        return None
    rate, distortion = plus_minus(numbers["kl"], 2), plus_minus(numbers["reconstruction"], 2, sign=-1)
    if over:
        active = f"{numbers['active']['count']} of {numbers['latent_dim']} latents are active"
        cost = f"the latents carry only {rate} nats ({active}), and the distortion is {distortion}"
    else:
        cost = f"the latents carry {rate} nats, for a distortion of {distortion}"
    words, change = _back_to_one(numbers.get("trained_with") or {}, implied["mean"])
    return Verdict(
        "over-regularized" if over else "under-regularized",
        "warning",
        f"the weights are stationary at beta = {plus_minus(implied)} (threshold "
        f"{OVER_BETA if over else UNDER_BETA:g}): {cost}{words}",
        "diagnosis-elbo.png",
        change,
    )


def is_importance_weighted(numbers: Numbers) -> bool:
    """Trained on a bound of several particles, where guides come to rest at widths that say nothing of beta."""
    trained = numbers.get("trained_with") or {}
    return trained.get("objective") in ("iwae", "dreg") and trained.get("num_particles", 1) > 1


def _is_under(numbers: Numbers) -> bool:
    """Below the beta of a default run; not of free bits at such a beta, which imply less however long they train."""
    trained = numbers.get("trained_with") or {}
    if is_importance_weighted(numbers):
        return False
    freed = trained.get("objective") == "free-bits" and trained.get("beta", 1.0) >= UNDER_BETA
    return not freed and _below(numbers["implied_beta"], UNDER_BETA)


def _back_to_one(trained: Numbers, implied: float) -> tuple[str, dict[str, Any]]:
    """beta = 1 where the run was trained at another; else what was done otherwise, and a longer training."""
    beta = trained.get("beta")
    if beta is None or not UNDER_BETA <= beta <= OVER_BETA:
        return "", {"beta": 1.0}
    words = f"; its options say beta = {beta:g}, so it was trained otherwise, or not for long enough"
    return words, {"epochs": 2 * trained["epochs"]} if "epochs" in trained else {"beta": 1.0}


def _dead_units(numbers: Numbers) -> Verdict | None:
    """Of a run that is over-regularized they are a symptom, which is said there."""
    active, L = numbers["active"]["count"], numbers["latent_dim"]
    implied = numbers["implied_beta"]
    if active >= FEWEST_ACTIVE * L or (implied is not None and _above(implied, OVER_BETA)):
        return None
    return Verdict(
        "dead units",
        "warning",
        f"{active} of {L} latents are active (threshold {FEWEST_ACTIVE:.0%}; in a healthy published model 19 of 50): "
        "the rest cost time and nothing else, unless they collapsed in training",
        "diagnosis-latents.png",
        {"latent_dim": max(2, 2 * active)},
    )


def _holes(numbers: Numbers) -> Verdict | None:
    found, effect = numbers["aggregate"]["holes"], numbers["aggregate"]["classifier"]["effect"]
    if found is None or not _above(found["share"], MOST_HOLES):
        return None
    return Verdict(
        "holes",
        "warning",
        f"{plus_minus(found['share'], 3)} of prior draws are covered by the images' smoothed posteriors less than "
        f"{1 - found['expected']:.0%} of other images' codes are (threshold {MOST_HOLES}, {found['expected']} if the "
        f"aggregate posterior were the prior); a classifier tells the two apart with an effect of "
        f"{plus_minus(effect, 2)} (0 if alike, 1 if apart)",
        "diagnosis-holes.png",
        _more_regularized(numbers),
    )


def _more_regularized(numbers: Numbers) -> dict[str, Any]:
    """What brings prior and codes together.

    beta = 1 for a run below it, a learned scale for a fixed one, which weighs as beta does, a prior that learns where
    the codes are for a standard normal, else twice the beta.
    """
    implied, trained = numbers["implied_beta"], numbers.get("trained_with") or {}
    if trained.get("beta", 1.0 if implied else 0.0) < UNDER_BETA or _is_under(numbers):
        return {"beta": 1.0}
    if trained.get("likelihood") == "normal-fixed":
        return {"likelihood": "normal"}
    if trained.get("prior") == _NORMAL and trained.get("objective") != "free-bits" and numbers["latent_dim"] > 1:
        return {"prior": "flow"}
    return {"beta": 2 * float(trained.get("beta") or 1.0)}


# --- The likelihood, and the estimate ---


def _mismatch(numbers: Numbers) -> Verdict | None:
    """A pixel of two values has one distribution alone: there the fault is the decoder's, not the likelihood's."""
    trained, found = numbers.get("trained_with") or {}, numbers["calibration"]
    if found is None or trained.get("likelihood") == "bernoulli" or found["verdict"] == "calibrated":
        return None
    if found["largest_deviation"] <= MISMATCH_DEVIATION:
        return None
    return Verdict(
        "likelihood mismatch",
        "warning",
        f"pixels are not where p(x | z) expects them: {found['verdict']}; the cumulative histogram is off by up to "
        f"{100 * found['largest_deviation']:.1f} points (threshold {100 * MISMATCH_DEVIATION:.0f})",
        "diagnosis-pixels.png",
        _other_likelihood(trained),
    )


# Likelihoods with shapes enough for each kind of data, the best first. Source: ours.
_FLEXIBLE = {
    "8-bit levels": ("discretized-logistic-mixture", "categorical"),
    "real values": ("normal-per-pixel", "student-t"),
    "probabilities": ("beta", "normal-per-pixel"),
    "counts": ("negative-binomial", "poisson"),
}


def _other_likelihood(trained: Numbers) -> dict[str, Any]:
    """A likelihood that has what the run's own lacks: a scale that it learns, or shapes."""
    word = trained.get("likelihood")
    if word == "normal-fixed":
        return {"likelihood": "normal"}
    best = _FLEXIBLE.get(trained.get("data", ""), ("normal",))
    return {"likelihood": next((other for other in best if other != word), best[0])}


def is_reliable(rise: Numbers, unreliable: Numbers) -> bool:
    """Neither the rise nor the share of unreliable images is beyond its threshold by three standard errors."""
    return not _above(rise, MOST_RISE) and not _above(unreliable, MOST_UNRELIABLE)


def _unreliable(numbers: Numbers) -> Verdict | None:
    found = numbers["importance"]
    if found is None:
        return None
    S = found["num_particles"]
    if is_reliable(found["rise"], found["unreliable"]):
        return None
    if S < 10:
        gained = "with so few particles nothing tells how far it has to rise"
    else:
        gained = (
            f"ten times the particles, S = {S // 10:,} to {S:,}, still gained {plus_minus(found['rise'], 2)} nats "
            f"(threshold {MOST_RISE:g})"
        )
    narrow = numbers["implied_beta"] is not None and _is_under(numbers)
    first = "; its guide is under-regularized, and more particles help little until that is mended" if narrow else ""
    return Verdict(
        "unreliable estimate",
        "warning",
        f"of log p(x): {gained}, and {plus_minus(found['unreliable'], 2)} of the images lack more than half a nat "
        f"(threshold {MOST_UNRELIABLE}){first}",
        "particles.png",
        {"beta": 1.0} if first else {"num_particles": max(5000, 10 * S)},
        TRAIN if first else EVALUATE,
    )


_JUDGES: Sequence[Callable[[Numbers], Verdict | None]] = (
    _autoencoder,
    _regularization,
    _holes,
    _dead_units,
    _mismatch,
    _unreliable,
)


# --- Numbers ---


def _error(value: Numbers) -> float:
    """Its standard error; of one that is not known, none."""
    stderr = value["stderr"]
    return 0.0 if stderr is None or math.isnan(stderr) else float(stderr)


def _known(value: Numbers) -> bool:
    return value["mean"] is not None and not math.isnan(value["mean"])


def _above(value: Numbers, threshold: float) -> bool:
    return _known(value) and value["mean"] - STDERRS * _error(value) > threshold


def _below(value: Numbers, threshold: float) -> bool:
    return _known(value) and value["mean"] + STDERRS * _error(value) < threshold
