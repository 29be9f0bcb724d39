"""The VAE as a scikit-learn estimator: its scores are nats of exactly the X that it is given."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

pytest.importorskip("sklearn", reason="the extra sklearn is not installed")
from sklearn.datasets import load_wine
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ppl_vae.estimator import VAEDensity

TINY: dict[str, Any] = {"epochs": 1, "num_particles": 5, "hidden": (8,), "latent_dim": 2, "random_state": 0}


def expected_failures(estimator: Any) -> dict[str, str]:
    noise = "scores are importance-sampled, and a row's draws depend on its place in X; means are equal to rounding"
    return dict.fromkeys(("check_methods_sample_order_invariance", "check_methods_subset_invariance"), noise)


@parametrize_with_checks([VAEDensity(**TINY)], expected_failed_checks=expected_failures)
def test_scikit_learns_own_checks_hold(estimator: Any, check: Any) -> None:
    check(estimator)


ROWS = np.random.RandomState(0)
OF_KINDS = {
    "binary": (ROWS.rand(60, 6) > 0.4, "bernoulli"),
    "8-bit levels": (ROWS.randint(0, 256, (60, 6)).astype(np.uint8), "discretized-logistic"),
    "counts": (ROWS.poisson(3.0, (60, 6)), "negative-binomial"),
    "probabilities": (ROWS.rand(60, 6), "normal"),
    "real values": (ROWS.randn(60, 6), "normal"),
}


@pytest.mark.parametrize("kind", OF_KINDS)
def test_the_kind_of_the_numbers_decides_the_likelihood(kind: str) -> None:
    X, likelihood = OF_KINDS[kind]
    fitted = VAEDensity(**TINY).fit(X)
    assert (fitted.kind_, fitted.likelihood_) == (kind, likelihood)


@pytest.mark.parametrize("kind", OF_KINDS)
def test_samples_and_means_are_in_the_layout_and_the_unit_of_the_data(kind: str) -> None:
    X, _ = OF_KINDS[kind]
    fitted = VAEDensity(**TINY).fit(X)
    means = fitted.inverse_transform(fitted.transform(X))
    assert means.shape == X.shape
    assert fitted.sample(3).shape == (3, 6)
    assert abs(means.mean() - X.mean()) < 0.5 * X.std() + 0.05  # training starts from the marginals
    assert np.isfinite(fitted.score_samples(fitted.sample(3).astype(X.dtype) if kind == "8-bit levels" else X)).all()


@pytest.mark.parametrize(
    ("shape", "words"), [((5, 4), {}), ((4, 4, 3), {}), ((20,), {"image_shape": (5, 4), "network": "conv"})]
)
def test_images_keep_their_layout(shape: tuple[int, ...], words: dict[str, Any]) -> None:
    X = np.random.RandomState(0).rand(40, *shape)
    fitted = VAEDensity(**TINY, **words).fit(X)
    assert fitted.score_samples(X[:7]).shape == (7,)
    assert fitted.sample(2).shape == (2, *shape)
    assert fitted.inverse_transform(fitted.transform(X[:3])).shape == (3, *shape)


@pytest.mark.parametrize("words", [{}, {"image_shape": (3, 4, 5)}], ids=["images", "rows"])
def test_channels_that_come_first_do_so_in_what_is_given_back(words: dict[str, Any]) -> None:
    levels = np.array([0.1, 0.5, 0.9])  # red, green and blue
    X = np.random.RandomState(0).normal(levels[:, None, None], 0.01, (40, 3, 4, 5))
    X = X.reshape(40, -1) if words else X
    fitted = VAEDensity(**TINY, **words).fit(X)
    assert fitted.event_shape_ == (3, 4, 5)
    for given in (fitted.inverse_transform(fitted.transform(X)), fitted.sample(40)):
        assert given.shape == X.shape
        np.testing.assert_allclose(given.reshape(40, 3, 20).mean((0, 2)), levels, atol=0.1)


# --- Scores ---


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_mass_of_binary_rows_sums_to_one_whatever_the_default_precision(default: torch.dtype) -> None:
    X = np.random.RandomState(0).randint(0, 2, (200, 4))
    every = np.array([[i >> d & 1 for d in range(4)] for i in range(16)])
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        scores = VAEDensity(**TINY | {"num_particles": 3000}).fit(X).score_samples(every)
    finally:
        torch.set_default_dtype(before)
    assert np.exp(scores).sum() == pytest.approx(1, abs=0.02)


def test_a_density_integrates_to_one() -> None:
    X = np.random.RandomState(0).randn(300, 1) * 2 + 5
    fitted = VAEDensity(**TINY | {"num_particles": 500}).fit(X)
    grid = np.linspace(-25, 35, 1201)[:, None]
    assert np.trapezoid(np.exp(fitted.score_samples(grid)), grid[:, 0]) == pytest.approx(1, abs=0.02)


UNITS = np.array([1e-6, 1.0, 1e5])


def correlated(num_rows: int) -> np.ndarray:
    C = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.3], [0.0, 0.3, 1.0]])
    return np.random.RandomState(0).multivariate_normal([0.0, 0.0, 0.0], C, num_rows)


def test_columns_in_other_units_are_learned_to_their_entropy() -> None:
    """Columns x = u y have log density log N(y; 0, C) - sum log u, here of three units far apart."""
    X = correlated(1200) * UNITS + [0.0, 7.0, -2e6]
    fitted = VAEDensity(random_state=0, latent_dim=2, hidden=(32,), epochs=60).fit(X[:800])
    C = np.cov(X[:800], rowvar=False)
    entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * C)[1]
    independent = 0.5 * np.log(2 * math.pi * math.e * np.diag(C)).sum()
    assert -independent + 0.2 < fitted.score(X[800:]) < -entropy + 0.15


@pytest.mark.parametrize("likelihood", ["normal", "normal-fixed", "normal-per-pixel", "laplace", "student-t"])
def test_the_unit_of_a_column_changes_scores_by_its_logarithm_alone(likelihood: str) -> None:
    X = correlated(60)
    plain = VAEDensity(**TINY, likelihood=likelihood).fit(X)
    other = VAEDensity(**TINY, likelihood=likelihood).fit(X * UNITS + 3 * UNITS)
    expected = plain.score_samples(X) - np.log(UNITS).sum()
    np.testing.assert_allclose(other.score_samples(X * UNITS + 3 * UNITS), expected, atol=2e-3)
    np.testing.assert_allclose(other.sample(20), plain.sample(20) * UNITS + 3 * UNITS, rtol=1e-3, atol=1e-3 * UNITS[2])
    np.testing.assert_allclose(other.transform(X * UNITS + 3 * UNITS), plain.transform(X), atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*hold one value")
def test_a_constant_column_and_a_narrow_one_far_from_zero_are_taken() -> None:
    """Seconds since 1970 within a minute: in single precision they are multiples of 128."""
    times = 1.6e9 + 30 * correlated(300)[:, :1]
    X = np.hstack([times, np.full((300, 1), 4.5)])
    fitted = VAEDensity(**TINY | {"epochs": 20}).fit(X)
    samples = fitted.sample(500)
    assert samples[:, 0].mean() == pytest.approx(1.6e9, abs=10)
    assert samples[:, 0].std() == pytest.approx(30, rel=0.3)
    assert fitted.inverse_transform(fitted.transform(X))[:, 1] == pytest.approx(4.5, abs=0.5)
    grid = np.stack([np.linspace(1.6e9 - 300, 1.6e9 + 300, 601), np.full(601, 4.5)], axis=1)
    two = fitted.score_samples(grid) - fitted.score_samples(grid[300:301])  # log p(t, 4.5) - log p(1.6e9, 4.5)
    assert np.exp(two).argmax() == pytest.approx(300, abs=15)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:X. Values repeat")  # wine's are rounded
def test_wine_is_scored_on_its_own_scale() -> None:
    """Columns from 0.1 to 300 wide; independent normals with a scale for each have -22.55 nats."""
    X = load_wine().data
    independent = -0.5 * np.log(2 * math.pi * math.e * X.var(0)).sum()
    assert independent == pytest.approx(-22.55, abs=0.01)
    assert independent + 3 < VAEDensity(random_state=0, epochs=200).fit(X).score(X) < independent + 8


def test_the_same_state_gives_the_same_numbers() -> None:
    X, _ = OF_KINDS["real values"]
    one, other = (VAEDensity(**TINY).fit(X) for _ in range(2))
    torch.rand(5)
    assert (one.score_samples(X) == other.score_samples(X)).all()
    assert (one.score_samples(X) == one.score_samples(X)).all()
    assert (one.sample(5) == other.sample(5)).all()


def test_the_global_generators_are_left_alone() -> None:
    X, _ = OF_KINDS["real values"]
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    fitted = VAEDensity(**TINY).fit(X)
    fitted.score(X), fitted.sample(2), fitted.transform(X)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()  # noqa: NPY002


def test_levels_are_scored_as_a_mass_whatever_the_likelihood() -> None:
    X, _ = OF_KINDS["8-bit levels"]
    fitted = VAEDensity(**TINY, likelihood="normal").fit(X)
    assert (fitted.score_samples(X) < 0).all()
    assert fitted.score(X) == pytest.approx(-6 * math.log(256), abs=3)


# --- In scikit-learn's tools ---


def test_a_pipeline_and_a_grid_search_choose_by_nats() -> None:
    X = np.random.RandomState(0).randn(60, 3) * [1, 10, 100]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), VAEDensity(**TINY)),
        {"vaedensity__latent_dim": np.arange(1, 3)},
        cv=2,
        error_score="raise",
    ).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.transform(X).shape == (60, search.best_params_["vaedensity__latent_dim"])


def test_the_latents_have_names() -> None:
    fitted = VAEDensity(**TINY).fit(OF_KINDS["real values"][0])
    assert list(fitted.get_feature_names_out()) == ["vaedensity0", "vaedensity1"]
    assert fitted.set_output(transform="default") is fitted


def test_the_latents_of_a_data_frame_come_as_one() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(OF_KINDS["real values"][0], index=range(100, 160), columns=list("abcdef"))
    fitted = VAEDensity(**TINY).fit(table).set_output(transform="pandas")
    z = fitted.transform(table)
    assert list(z.columns) == list(fitted.get_feature_names_out())
    assert list(z.index) == list(table.index)
    assert (fitted.inverse_transform(z) == fitted.inverse_transform(z.to_numpy())).all()


def test_a_clone_has_the_parameters_as_they_were_given() -> None:
    hidden = [7, 5]
    estimator = VAEDensity(hidden=hidden, image_shape=None)
    assert estimator.hidden is hidden
    assert clone(estimator).get_params() == estimator.get_params()


# --- Refusals ---


@pytest.mark.parametrize(
    ("X", "words", "message"),
    [
        (np.random.RandomState(0).randn(30, 3), {"likelihood": "bernoulli"}, "expected"),
        (np.random.RandomState(0).rand(30, 3) * 9, {"likelihood": "beta"}, "expected"),
        (np.random.RandomState(0).randn(30, 3, 2) * 1e-4 + 1e6, {}, "training images that differ"),
        (np.full((30, 3), 0.5), {}, "differ"),
        (np.random.RandomState(0).randn(30, 3), {"image_shape": (2, 2)}, "image_shape"),
        (np.random.RandomState(0).randn(30, 3), {"posterior": "delta", "prior": "standard-normal"}, "no log p"),
        (np.random.RandomState(0).randn(30, 3), {"network": "resnet"}, "--network: expected one of"),
        (np.random.RandomState(0).randn(30, 3), {"validation_fraction": 1}, "validation_fraction"),
        (np.random.RandomState(0).randn(30, 2, 2, 2, 2), {}, "expected"),
        (np.random.RandomState(0).rand(30, 3), {"binarization": "dynamic"}, "binarization: expected none or threshold"),
        (np.ma.masked_greater(np.random.RandomState(0).rand(30, 3), 0.9), {}, "without masked values"),
    ],
    ids=[
        "real-bernoulli",
        "beyond-1",
        "rounding",
        "constant",
        "shape",
        "delta",
        "word",
        "fraction",
        "dims",
        "drawn",
        "masked",
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(X: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        VAEDensity(**TINY | words).fit(X)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "X"),
    [("binary", np.full((3, 6), 2)), ("8-bit levels", np.full((3, 6), 0.5)), ("counts", np.full((3, 6), -1))],
)
def test_values_off_the_support_are_refused(kind: str, X: Any) -> None:
    fitted = VAEDensity(**TINY).fit(OF_KINDS[kind][0])
    with pytest.raises(ValueError, match=r"X: .*expected"):
        fitted.score_samples(X)


def test_without_scikit_learn_one_line_says_what_is_missing() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import ppl_vae.estimator"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: ppl_vae.estimator: expected scikit-learn; pip install 'ppl_vae[sklearn]' brings it"
    )


def test_counts_are_counts_also_as_floats() -> None:
    fitted = VAEDensity(**TINY).fit(OF_KINDS["counts"][0].astype(float))
    assert (fitted.kind_, fitted.likelihood_) == ("counts", "negative-binomial")


def test_a_density_of_levels_is_warned_of() -> None:
    levels = np.random.RandomState(0).randint(0, 17, (200, 6))
    with pytest.warns(UserWarning, match="X: Values repeat in columns 0, 1, 2, 3, 4 and 1 more"):
        VAEDensity(**TINY).fit(StandardScaler().fit_transform(levels))


@pytest.mark.parametrize("X", [ROWS.randn(200, 6), ROWS.rand(200, 6), ROWS.poisson(3.0, (200, 6)).astype(float)])
def test_continuous_values_and_masses_are_not_warned_of(X: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VAEDensity(**TINY).fit(X)
