"""Verdicts: each threshold at its edge, what one finding makes of another, and what would change it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ppl_vae.diagnostics import verdicts as judge
from ppl_vae.diagnostics.aggregate import Holes, KolmogorovSmirnov, LatentMoments, TwoSample
from ppl_vae.diagnostics.latents import ActiveUnits, PerLatent
from ppl_vae.diagnostics.likelihood import NoiseSpectrum, PixelCalibration
from ppl_vae.diagnostics.measurement import AggregateNumbers, EstimateQuality, Measurements, PictureNumbers, TrainedWith
from ppl_vae.diagnostics.verdicts import Verdict, verdicts
from ppl_vae.evidence.estimate import Estimate

TRAINED = TrainedWith(beta=1.0, likelihood="normal", epochs=10, prior="flow", data="real values")
STANDARD = replace(TRAINED, prior="standard-normal")
ZEROS = torch.zeros(40)


def value(mean: float, stderr: float = 0.0) -> Estimate:
    return Estimate(mean, stderr)


def aggregate(share: float | None = 0.05, effect: float = 0.2) -> AggregateNumbers:
    holes = None
    if share is not None:
        holes = Holes(value(share), 0.01, 0.0, (), ())
    moments = LatentMoments(PerLatent(ZEROS, ZEROS), PerLatent(ZEROS, ZEROS))
    return AggregateNumbers(moments, KolmogorovSmirnov(ZEROS), TwoSample(value(effect), 100), holes)


def active(count: int) -> ActiveUnits:
    return ActiveUnits(count, ZEROS, ZEROS)


def pixels(deviation: float, verdict: str = "scales are too wide") -> PixelCalibration:
    return PixelCalibration(value(0.1), value(0.1), deviation, verdict, (), 100, 99)


def estimate(rise: float = 0.8, unreliable: float = 0.1, num_particles: int = 200) -> EstimateQuality:
    return EstimateQuality(value(-90.0), value(rise), value(unreliable), 300, num_particles)


def noise(*eigenvalues: float, edge: float = 0.0) -> NoiseSpectrum:
    return NoiseSpectrum(torch.tensor(eigenvalues, dtype=torch.double), edge)


def numbers(**changed: Any) -> Measurements:
    """The measurements of a run with nothing wrong, apart from what is changed."""
    healthy: dict[str, Any] = {
        "autoencoder": False,
        "num_images": 1000,
        "num_pixels": 100,
        "trained_with": TRAINED,
        "latent_dim": 40,
        "active": active(20),
        "reconstruction": value(-70.0, 0.5),
        "kl": value(25.0, 0.1),
        "kl_by_latent": None,
        "implied_beta": value(1.0, 0.01),
        "elbo_split": None,
        "aggregate": aggregate(),
        "pictures": PictureNumbers(value(0.9, 0.01), None),
        "calibration": pixels(0.01, "calibrated"),
        "noise": noise(30.0, 20.0, 0.5),
        "importance": estimate(),
    }
    return Measurements(**(healthy | changed))


def words(given: Measurements) -> list[str]:
    return [verdict.word for verdict in verdicts(given)]


def only(given: Measurements) -> Verdict:
    (verdict,) = verdicts(given)
    return verdict


def test_a_run_with_nothing_wrong_is_healthy():
    assert words(numbers()) == ["healthy"]
    assert only(numbers()).change is None


# --- Thresholds at their edges ---

EDGES: dict[str, Any] = {
    "over-regularized": (lambda v: {"implied_beta": value(v)}, judge.OVER_BETA, +1),
    "under-regularized": (lambda v: {"implied_beta": value(v)}, judge.UNDER_BETA, -1),
    "decoder ignores z": (lambda v: {"pictures": PictureNumbers(value(v), None)}, judge.SAME_VARIATION, -1),
    "dead units": (lambda v: {"active": active(v)}, 40 * judge.FEWEST_ACTIVE, -1),
    "likelihood mismatch": (lambda v: {"calibration": pixels(v)}, judge.MISMATCH_DEVIATION, +1),
    "holes": (lambda v: {"aggregate": aggregate(v)}, judge.MOST_HOLES, +1),
    "unreliable estimate": (lambda v: {"importance": estimate(v)}, judge.MOST_RISE, +1),
}


@pytest.mark.parametrize("word", EDGES)
def test_a_verdict_needs_a_number_beyond_its_threshold(word):
    change, threshold, side = EDGES[word]
    assert words(numbers(**change(threshold))) == ["healthy"]
    assert words(numbers(**change(threshold + side * 1e-6))) == [word]


@pytest.mark.parametrize(
    ("stderr", "expected"), [(0.32, "over-regularized"), (0.34, "healthy"), (math.nan, "over-regularized")]
)
def test_a_verdict_needs_three_known_standard_errors(stderr, expected):
    assert words(numbers(implied_beta=value(judge.OVER_BETA + 1, stderr))) == [expected]


# --- What one finding makes of another ---


def test_latents_are_not_judged_if_the_decoder_ignores_them():
    same = PictureNumbers(value(0.0), None)
    ignored = numbers(kl=value(0.0), pictures=same, active=active(0), implied_beta=None)
    assert words(ignored) == ["decoder ignores z"]


AUTOENCODER: dict[str, Any] = {
    "autoencoder": True,
    "kl": None,
    "implied_beta": None,
    "calibration": None,
    "importance": None,
    "aggregate": aggregate(None, 0.99),
}


def test_an_autoencoder_has_one_verdict():
    verdict = only(numbers(**AUTOENCODER))
    assert (verdict.word, verdict.change) == ("autoencoder", {"posterior": "diagonal", "beta": 1.0})


def test_both_of_two_findings_are_reported():
    assert words(numbers(implied_beta=value(0.01), aggregate=aggregate(0.99))) == ["under-regularized", "holes"]


@pytest.mark.parametrize("collapsed", [False, True])
def test_a_training_that_still_gains_nats_needs_epochs_before_anything_else(collapsed):
    found = only(numbers(trained_with=replace(TRAINED, epochs=5, last_rise=3.0), **(COLLAPSED if collapsed else {})))
    assert (found.word, found.severity, found.change) == ("not settled", "warning", {"epochs": 20})
    settled = numbers(trained_with=replace(TRAINED, epochs=5, last_rise=0.9))
    assert words(settled) == ["healthy"]


# --- What would change it ---

COLLAPSED: dict[str, Any] = {"kl": value(0.0)}
HOLES: dict[str, Any] = {"aggregate": aggregate(0.99)}


@pytest.mark.parametrize(
    ("changed", "trained", "change"),
    [
        (COLLAPSED, replace(STANDARD, beta=100.0), {"beta": 1.0}),
        (COLLAPSED, TRAINED, {"warmup_epochs": 6}),
        ({"implied_beta": value(20.0)}, replace(TRAINED, beta=20.0), {"beta": 1.0}),
        ({"implied_beta": value(3.0)}, TRAINED, {"epochs": 20}),
        ({"active": active(3)}, TRAINED, {"latent_dim": 6}),
        (HOLES, replace(TRAINED, beta=0.01), {"beta": 1.0}),
        (HOLES, TRAINED, {"beta": 2.0}),
        (HOLES, STANDARD, {"prior": "flow"}),
        ({"calibration": pixels(0.3)}, TRAINED, {"likelihood": "normal-per-pixel"}),
        (
            {"calibration": pixels(0.3)},
            replace(TRAINED, likelihood="discretized-logistic-mixture", data="8-bit levels"),
            None,
        ),
        ({"importance": estimate(5.0)}, TRAINED, {"num_particles": 5000}),
    ],
)
def test_the_change_fits_the_training(changed, trained, change):
    assert only(numbers(**changed, trained_with=trained)).change == change


@pytest.mark.parametrize(
    ("beta", "eigenvalues", "edge", "evidence"),
    [
        (100.0, (30.0, 20.0, 0.5), 0.0, "the noise predicts it"),
        (1.0, (30.0, 20.0, 0.5), 0.0, "the noise does not predict it: at beta = 1 2 directions"),
        (1.0, (1.3, 1.1, 0.9), 1.45, "the noise predicts it"),
        (1.0, (1.3, 1.1, 0.9), 1.2, "1 directions exceed it"),
    ],
)
def test_a_collapse_is_compared_with_what_the_noise_predicts(beta, eigenvalues, edge, evidence):
    given = numbers(**COLLAPSED, noise=noise(*eigenvalues, edge=edge), trained_with=replace(TRAINED, beta=beta))
    assert evidence in only(given).evidence


@pytest.mark.parametrize(
    ("objective", "beta", "implied", "expected"),
    [
        ("free-bits", 1.0, 0.3, "healthy"),
        ("elbo", 1.0, 0.3, "under-regularized"),
        ("free-bits", 0.1, 0.05, "under-regularized"),
        ("free-bits", 1.0, 3.0, "over-regularized"),
    ],
)
def test_free_bits_at_a_usual_beta_are_not_under_regularized(objective, beta, implied, expected):
    trained = replace(TRAINED, objective=objective, beta=beta)
    assert words(numbers(implied_beta=value(implied, 0.01), trained_with=trained)) == [expected]


@pytest.mark.parametrize("implied", [0.1, 5.0])
def test_a_bound_of_several_particles_implies_no_beta(implied):
    trained = replace(TRAINED, objective="dreg", num_particles=8)
    given = numbers(implied_beta=value(implied, 0.01), trained_with=trained)
    assert words(given) == ["healthy"]
    assert words(replace(given, trained_with=replace(trained, num_particles=1))) != ["healthy"]
