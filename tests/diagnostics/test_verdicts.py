"""What numbers mean in words: each threshold at its edge, and what a verdict's change is."""

from __future__ import annotations

import math

import pytest

from ppl_vae.diagnostics import verdicts as judge
from ppl_vae.diagnostics.verdicts import EVALUATE, verdicts


def value(mean, stderr=0.0):
    return {"mean": mean, "stderr": stderr}


def numbers(**changed):
    """Of a run that nothing is wrong with, and what is changed of it."""
    healthy = {
        "autoencoder": False,
        "num_images": 1000,
        "num_pixels": 100,
        "latent_dim": 40,
        "trained_with": {"beta": 1.0, "likelihood": "normal", "data": "real values", "epochs": 10},
        "kl": value(25.0, 0.1),
        "reconstruction": value(-70.0, 0.5),
        "implied_beta": value(1.0, 0.01),
        "active": {"count": 20},
        "pictures": {"variation": value(0.9, 0.01)},
        "aggregate": {"classifier": {"effect": value(0.2, 0.02)}, "holes": {"share": value(0.05), "expected": 0.01}},
        "calibration": {"verdict": "calibrated", "largest_deviation": 0.01},
        "importance": {"rise": value(0.8, 0.04), "unreliable": value(0.1, 0.02), "num_particles": 200},
        "noise": {"eigenvalues": [30.0, 20.0, 0.5], "live_by_mean": 0},
    }
    return healthy | changed


def words(given):
    return [verdict.word for verdict in verdicts(given)]


def only(given):
    (verdict,) = verdicts(given)
    return verdict


def test_a_run_that_nothing_stands_out_of_is_healthy():
    assert words(numbers()) == ["healthy"]
    assert only(numbers()).change is None


# --- Thresholds at their edges ---

EDGES = {
    "over-regularized": (lambda v: {"implied_beta": value(v)}, judge.OVER_BETA, +1),
    "under-regularized": (lambda v: {"implied_beta": value(v)}, judge.UNDER_BETA, -1),
    "decoder ignores z": (lambda v: {"pictures": {"variation": value(v)}}, judge.SAME_VARIATION, -1),
    "dead units": (lambda v: {"active": {"count": v}}, 40 * judge.FEWEST_ACTIVE, -1),
    "likelihood mismatch": (
        lambda v: {"calibration": {"verdict": "scales are too wide", "largest_deviation": v}},
        judge.MISMATCH_DEVIATION,
        +1,
    ),
    "holes": (
        lambda v: {"aggregate": numbers()["aggregate"] | {"holes": {"share": value(v), "expected": 0.01}}},
        judge.MOST_HOLES,
        +1,
    ),
    "unreliable estimate": (
        lambda v: {"importance": numbers()["importance"] | {"rise": value(v)}},
        judge.MOST_RISE,
        +1,
    ),
}


@pytest.mark.parametrize("word", EDGES)
def test_a_verdict_is_beyond_its_threshold_and_not_at_it(word):
    change, threshold, side = EDGES[word]
    assert words(numbers(**change(threshold))) == ["healthy"]
    assert words(numbers(**change(threshold + side * 1e-6))) == [word]


def test_a_rate_of_nearly_nothing_is_a_decoder_that_ignores_z():
    assert words(numbers(kl=value(judge.SAME_RATE))) == ["healthy"]
    assert words(numbers(kl=value(judge.SAME_RATE - 1e-6))) == ["decoder ignores z"]


def test_a_share_of_unreliable_images_is_enough():
    found = numbers()["importance"] | {"unreliable": value(judge.MOST_UNRELIABLE + 1e-6)}
    assert words(numbers(importance=found)) == ["unreliable estimate"]


@pytest.mark.parametrize(("stderr", "expected"), [(0.32, "over-regularized"), (0.34, "healthy")])
def test_a_verdict_needs_three_standard_errors(stderr, expected):
    assert words(numbers(implied_beta=value(judge.OVER_BETA + 1, stderr))) == [expected]


def test_an_error_that_is_not_known_is_not_held_against_the_number():
    assert words(numbers(implied_beta=value(3.0, None))) == ["over-regularized"]
    assert words(numbers(implied_beta=value(3.0, math.nan))) == ["over-regularized"]


def test_a_number_that_is_not_known_is_no_finding():
    unknown = {"rise": value(math.nan, math.nan), "unreliable": value(0.1), "num_particles": 5}
    assert words(numbers(importance=unknown)) == ["healthy"]


# --- What one finding makes of another ---


def test_where_the_decoder_ignores_z_nothing_else_is_said_of_latents():
    ignored = {"kl": value(0.0), "pictures": {"variation": value(0.0)}, "active": {"count": 0}, "implied_beta": None}
    assert words(numbers(**ignored)) == ["decoder ignores z"]


def test_units_that_over_regularization_killed_are_said_with_it():
    verdict = only(numbers(implied_beta=value(20.0, 0.1), active={"count": 2}))
    assert verdict.word == "over-regularized"
    assert "2 of 40" in verdict.evidence


def test_zeros_and_ones_have_one_distribution_alone():
    wrong = {"calibration": {"verdict": "scales are too wide", "largest_deviation": 0.3}}
    assert words(numbers(**wrong, trained_with={"likelihood": "bernoulli"})) == ["healthy"]


AUTOENCODER = {
    "autoencoder": True,
    "kl": None,
    "implied_beta": None,
    "calibration": None,
    "importance": None,
    "aggregate": {"classifier": {"effect": value(0.99)}, "holes": None},
}


def test_an_autoencoder_is_said_to_be_one_and_nothing_of_densities():
    verdict = only(numbers(**AUTOENCODER))
    assert (verdict.word, verdict.change) == ("autoencoder", {"posterior": "diagonal", "beta": 1.0})


def test_an_autoencoder_can_ignore_z_too():
    given = numbers(**AUTOENCODER, pictures={"variation": value(0.0)})
    assert words(given) == ["decoder ignores z", "autoencoder"]


def test_the_worst_comes_first():
    given = numbers(implied_beta=value(0.01), aggregate=EDGES["holes"][0](0.99)["aggregate"])
    assert words(given) == ["under-regularized", "holes"]


# --- What would change it ---


def test_a_collapse_that_the_noise_predicts_is_changed_by_beta():
    given = numbers(kl=value(0.0), trained_with={"beta": 100.0})
    assert only(given).change == {"beta": 1.0}
    assert "the noise predicts it" in only(given).evidence


def test_a_collapse_without_a_warm_up_gets_one():
    given = numbers(kl=value(0.0), trained_with={"beta": 100.0, "warmup_epochs": 0, "epochs": 10})
    assert only(given).change == {"beta": 1.0, "warmup_epochs": 3}


def test_a_collapse_that_the_noise_does_not_predict_is_not_put_down_to_it():
    assert only(numbers(kl=value(0.0))).change == {"objective": "free-bits"}
    assert "the noise does not predict it: at beta = 1 2 directions" in only(numbers(kl=value(0.0))).evidence


def test_a_collapse_by_a_fixed_scale_is_changed_by_one_that_is_learned():
    given = numbers(
        kl=value(0.0),
        noise={"eigenvalues": [0.3], "live_by_mean": 0},
        trained_with={"beta": 1.0, "likelihood": "normal-fixed"},
    )
    assert only(given).change == {"likelihood": "normal"}


NOISE = {"eigenvalues": [1.3, 1.1, 0.9], "live_by_mean": 0}


@pytest.mark.parametrize(("edge", "said"), [(1.45, "the noise predicts it"), (1.2, "1 directions exceed it")])
def test_a_direction_that_independent_pixels_reach_does_not_stand_against_a_collapse(edge, said):
    assert said in only(numbers(kl=value(0.0), noise=NOISE | {"edge": edge})).evidence


@pytest.mark.parametrize(
    ("objective", "beta", "implied", "expected"),
    [
        ("free-bits", 1.0, 0.3, "healthy"),
        ("elbo", 1.0, 0.3, "under-regularized"),
        ("free-bits", 0.1, 0.05, "under-regularized"),
        ("free-bits", 1.0, 3.0, "over-regularized"),
    ],
)
def test_free_bits_imply_less_than_their_beta_without_being_under_regularized(objective, beta, implied, expected):
    trained = {"objective": objective, "beta": beta}
    assert words(numbers(implied_beta=value(implied, 0.01), trained_with=trained)) == [expected]


def test_holes_of_free_bits_are_not_changed_to_the_beta_that_they_have():
    given = numbers(
        implied_beta=value(0.3),
        aggregate=EDGES["holes"][0](0.99)["aggregate"],
        trained_with={"objective": "free-bits", "beta": 1.0},
    )
    assert only(given).change == {"beta": 2.0}


def test_another_beta_goes_back_to_one():
    assert only(numbers(implied_beta=value(20.0), trained_with={"beta": 20.0})).change == {"beta": 1.0}


def test_weights_that_are_not_at_their_own_beta_need_more_epochs():
    assert only(numbers(implied_beta=value(3.0))).change == {"epochs": 20}


@pytest.mark.parametrize(
    ("implied", "likelihood", "change"),
    [
        (0.01, "bernoulli", {"beta": 1.0}),
        (1.0, "bernoulli", {"beta": 2.0}),
        (1.0, "normal-fixed", {"likelihood": "normal"}),
    ],
)
def test_holes_are_changed_by_what_weighs_the_latents(implied, likelihood, change):
    given = numbers(
        implied_beta=value(implied),
        aggregate=EDGES["holes"][0](0.99)["aggregate"],
        trained_with={"beta": implied, "likelihood": likelihood},
    )
    (holes,) = [verdict for verdict in verdicts(given) if verdict.word == "holes"]
    assert holes.change == change


def test_holes_of_a_standard_normal_prior_are_changed_by_one_that_learns_where_codes_are():
    trained = {"beta": 1.0, "likelihood": "bernoulli", "prior": "standard-normal"}
    holes = EDGES["holes"][0](0.99)["aggregate"]
    assert only(numbers(aggregate=holes, trained_with=trained)).change == {"prior": "flow"}
    assert only(numbers(aggregate=holes, trained_with=trained | {"prior": "flow"})).change == {"beta": 2.0}


@pytest.mark.parametrize("part", [{"prior": "flow"}, {"posterior": "full"}])
def test_free_bits_are_not_asked_of_parts_without_a_kl_of_each_latent(part):
    trained = {"beta": 1.0, "epochs": 10} | part
    assert "objective" not in only(numbers(kl=value(0.0), trained_with=trained)).change


@pytest.mark.parametrize("implied", [0.1, 5.0])
def test_widths_of_a_bound_of_several_particles_are_no_sign_of_beta(implied):
    trained = {"beta": 1.0, "objective": "dreg", "num_particles": 8}
    assert words(numbers(implied_beta=value(implied, 0.01), trained_with=trained)) == ["healthy"]
    assert words(numbers(implied_beta=value(implied, 0.01), trained_with=trained | {"num_particles": 1})) != ["healthy"]


def test_a_mismatch_is_changed_by_another_likelihood_than_the_runs():
    wrong = {"calibration": {"verdict": "scales are too wide", "largest_deviation": 0.3}}
    assert only(numbers(**wrong)).change == {"likelihood": "normal-per-pixel"}
    levels = {"likelihood": "discretized-logistic-mixture", "data": "8-bit levels"}
    assert only(numbers(**wrong, trained_with=levels)).change == {"likelihood": "categorical"}


def test_an_unreliable_estimate_is_evaluated_again():
    verdict = only(numbers(importance=numbers()["importance"] | {"rise": value(5.0)}))
    assert (verdict.script, verdict.change) == (EVALUATE, {"num_particles": 5000})


def test_more_particles_are_not_asked_for_where_the_guide_is_the_cause():
    loose = {"rise": value(4.0, 0.1), "unreliable": value(0.9, 0.02), "num_particles": 200}
    narrow = {v.word: v for v in verdicts(numbers(implied_beta=value(0.01, 0.001), importance=loose))}
    assert narrow["unreliable estimate"].change == {"beta": 1.0}
    assert only(numbers(importance=loose)).change == {"num_particles": 5000}
