"""Simulation-based calibration, against guides that are exact and guides whose error is known."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, NormalFixed
from scipy import stats
from torch.testing import assert_close

from ppl_vae import VAE, Conditional
from ppl_vae.evidence import guide_calibration
from ppl_vae.evidence.guide_calibration import judge
from ppl_vae.evidence.rank_statistics import (
    Ranks,
    adjust_p_values,
    bin_edges,
    count_ranks,
    cumulative_band,
    estimate_shape,
    rank_p_values,
)
from ppl_vae.hierarchy import BottomLayerOnly, BottomUp, HierarchicalVAE, LayeredPrior
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import Delta, DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.reports.figures.certificate import RankHistogram, calibration_ranks
from ppl_vae.runtime import batching
from ppl_vae.runtime.batching import floats_per_pixel
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.global_state import seeded
from ppl_vae.weights import DeterministicGuide

CPU = torch.device("cpu")


def ranked(vae, *, seed=0, num_simulations=1000, num_draws=99, **options):
    with seeded(seed, CPU):
        return guide_calibration.compute_ranks(vae, num_simulations=num_simulations, num_draws=num_draws, **options)


def uniform_ranks(num_simulations, num_draws, *, latents=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_draws + 1, (num_simulations, latents + 1), generator=generator)
    return Ranks(drawn[:, :-1], drawn[:, -1], num_draws)


def prior_as_guide():
    """q(z | x) = p(z), which knows nothing of x."""
    vae = LinearGaussian.random().vae()
    return VAE(vae.prior, vae.likelihood, lambda x: vae.prior().expand((len(x),)))


def affine(inputs, outputs, *, seed):
    torch.manual_seed(seed)
    return MLP(inputs, outputs, hidden=()).double()


def hierarchical():
    prior = LayeredPrior(StandardNormal(1).double(), [Conditional(affine(1, 4, seed=0), DiagonalNormal(2))])
    to_layers = [
        Conditional(affine(5, 4, seed=1), DiagonalNormal(2)),
        Conditional(affine(2, 2, seed=2), DiagonalNormal(1)),
    ]
    decoder = BottomLayerOnly(affine(2, 5, seed=3), prior.latent_dims)
    return HierarchicalVAE(prior, Conditional(decoder, NormalFixed((5,), 0.7)), BottomUp(to_layers))


# --- Ranks ---


def test_ranks_are_counts_of_draws_below_the_truth():
    oracle = LinearGaussian.random()
    vae, N, M = oracle.vae(widen=1.3), 40, 7
    found = ranked(vae, num_simulations=N, num_draws=M)
    with seeded(0, CPU), torch.no_grad():  # the same draws, in the order of the program
        z_true = vae.prior().sample((N,))
        first = z_true[:1] @ oracle.W.T + oracle.b
        torch.normal(first, oracle.scale)  # an image that says how large images are, and the guide's draw for it
        vae.posterior(first).sample((1,))
        x = torch.normal(z_true @ oracle.W.T + oracle.b, oracle.scale)
        z = vae.posterior(x).sample((M,)).numpy()
    z_true, x, W, b = z_true.numpy(), x.numpy(), oracle.W.numpy(), oracle.b.numpy()

    def log_joint(z):
        return stats.norm.logpdf(z).sum(-1) + stats.norm.logpdf(x, z @ W.T + b, oracle.scale).sum(-1)

    np.testing.assert_array_equal(found.latents, (z < z_true).sum(0))
    np.testing.assert_array_equal(found.log_joint, (log_joint(z) < log_joint(z_true)).sum(0))


def test_passes_of_few_vectors_give_ranks_among_all_draws(monkeypatch):
    vae = LinearGaussian.random().vae(widen=0.7)
    x = torch.zeros(1, 6, dtype=torch.double)
    monkeypatch.setitem(batching.PASS_BYTES, "cpu", 8 * 6 * floats_per_pixel(vae.likelihood) * 10)
    assert batching.images_per_pass(x, vae.likelihood) == 10
    found = estimate_shape(ranked(vae, num_simulations=200, num_draws=39).latents, 39)  # four passes an image
    assert_close(found.scale, torch.full((3,), 0.7, dtype=torch.double), atol=0.2, rtol=0)


def test_the_encoder_runs_once_an_image():
    vae, seen = LinearGaussian.random().vae(), []
    vae.posterior.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    ranked(vae, num_simulations=50, num_draws=500)
    assert sum(seen) == 50 + 1  # and one that tells whether the guide has a density


def test_progress_counts_every_simulation():
    counted = []
    ranked(LinearGaussian.random().vae(), num_simulations=130, progress=counted.append)
    assert sum(counted) == 130


def test_ties_are_broken_at_random():
    """Of a z that is one of three vectors, ranks would pile up if ties did not."""

    def prior():
        return dist.OneHotCategorical(logits=torch.zeros(3, dtype=torch.double))

    def likelihood(z):
        return dist.Bernoulli(logits=z @ torch.tensor([[2.0, -1.0], [-2.0, 0.5], [0.0, 1.0]]).double()).to_event(1)

    def posterior(x):
        each = torch.stack([likelihood(one).log_prob(x) for one in torch.eye(3, dtype=torch.double)], dim=-1)
        return dist.OneHotCategorical(logits=each)

    assert judge(ranked(VAE(prior, likelihood, posterior), num_simulations=2000)).p_value > 0.01


def test_all_layers_of_a_hierarchy_are_one_vector():
    found = ranked(hierarchical(), num_simulations=30)
    assert tuple(found.latents.shape) == (30, 3)


def test_a_deterministic_guide_is_refused():
    encoder = affine(6, 3, seed=0)
    vae = LinearGaussian.random().vae()
    with pytest.raises(DeterministicGuide, match="expected a density to calibrate"):
        ranked(VAE(vae.prior, vae.likelihood, Conditional(encoder, Delta(3))))


@pytest.mark.parametrize("name", ["num_simulations", "num_draws"])
def test_none_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        ranked(LinearGaussian.random().vae(), **{name: 0})


class Nowhere(dist.MultivariateNormal):
    """Draws, and has a density that is not a number."""

    def log_prob(self, value):
        return math.nan * super().log_prob(value)


def test_a_density_that_is_not_a_number_is_refused():
    vae = LinearGaussian.random().vae()
    broken = VAE(lambda: Nowhere(torch.zeros(3).double(), torch.eye(3).double()), vae.likelihood, vae.posterior)
    with pytest.raises(NotFinite, match="got NaN"):
        ranked(broken, num_simulations=5)


# --- p-values ---


@pytest.fixture(scope="module")
def p_values_of_the_exact_guide():
    """(100, 4): of a hundred small calibrations of the linear VAE whose guide is its posterior."""
    vae = LinearGaussian.random().vae()
    return torch.stack(
        [rank_p_values(ranked(vae, seed=seed, num_simulations=400, num_draws=63)) for seed in range(100)]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("quantity", range(4), ids=["latent 1", "latent 2", "latent 3", "log p(x, z)"])
def test_p_values_of_an_exact_guide_are_uniform(p_values_of_the_exact_guide, quantity):
    """Four tests with the same seed for good: each fails by chance once in a thousand seeds."""
    assert stats.kstest(p_values_of_the_exact_guide[:, quantity], "uniform").pvalue > 1e-3


def test_an_exact_guide_is_seldom_called_wrong(p_values_of_the_exact_guide):
    """At 5%: 100 calibrations would be called wrong more than 13 times once in a thousand seeds."""
    overall = torch.stack([adjust_p_values(p).min() for p in p_values_of_the_exact_guide])
    assert int((overall < 0.05).sum()) <= 13


@pytest.mark.parametrize("num_draws", [99, 100, 63, 10])
def test_the_p_value_is_chi_squares(num_draws):
    """Bins hold as many ranks as they do, whether or not their number divides M + 1."""
    found = uniform_ranks(700, num_draws)
    at = bin_edges(700, num_draws).numpy()
    expected = 700 * np.diff(at) / (num_draws + 1)
    right = [stats.chisquare(np.histogram(of_one, bins=at - 0.5)[0], expected).pvalue for of_one in found.all.numpy().T]
    assert_close(rank_p_values(found), torch.tensor(right, dtype=torch.double))


@pytest.mark.parametrize("num_draws", [1, 2, 10, 19, 99, 100, 4000])
@pytest.mark.parametrize("num_simulations", [1, 30, 1000])
def test_bins_hold_every_rank_once(num_simulations, num_draws):
    counts = count_ranks(torch.arange(num_draws + 1), bin_edges(num_simulations, num_draws))
    assert int(counts.sum()) == num_draws + 1
    assert int(counts.max() - counts.min()) <= 1


def test_adjusted_p_values_are_holms():
    """By hand: 4 x 0.01, then 3 x 0.02 = 0.06, then 2 x 0.025 = 0.05, raised to the one before, then 0.9."""
    p = torch.tensor([0.025, 0.01, 0.9, 0.02], dtype=torch.double)
    assert_close(adjust_p_values(p), torch.tensor([0.06, 0.04, 0.9, 0.06], dtype=torch.double))


# --- Guides that are wrong ---

WRONG = {
    "a scale of 0.7": ({"widen": 0.7}, "too narrow"),
    "a scale of 1.4": ({"widen": 1.4}, "too wide"),
    "half a scale above": ({"shift": 0.5}, "above the posterior"),
    "half a scale below": ({"shift": -0.5}, "below the posterior"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_guide_is_caught_and_named(name):
    options, words = WRONG[name]
    found = judge(ranked(LinearGaussian.random().vae(**options)))
    assert found.p_value < 1e-3
    assert all(words in each for each in found.words[:-1]), found.words


@pytest.mark.parametrize("widen", [0.5, 0.7, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("shift", [0.0, -0.8])
@pytest.mark.parametrize("num_draws", [3, 99])
def test_scale_and_shift_are_those_of_the_guide(widen, shift, num_draws):
    """Exactly so for normals, for few draws as for many; of 60 numbers none is off by more than 4.5 errors."""
    found = estimate_shape(
        ranked(LinearGaussian.random().vae(widen=widen, shift=shift), num_draws=num_draws).latents, num_draws
    )
    assert (((found.scale - widen) / found.scale_stderr).abs() < 4.5).all(), found
    assert (((found.shift - shift) / found.shift_stderr).abs() < 4.5).all(), found


@pytest.mark.thorough
def test_the_errors_of_scale_and_shift_are_those_of_repeated_calibrations():
    """The standard deviation of 150 has an error of 6%."""
    vae = LinearGaussian.random().vae(widen=0.8, shift=0.4)
    shapes = [
        estimate_shape(ranked(vae, seed=seed, num_simulations=300, num_draws=19).latents, 19) for seed in range(150)
    ]
    for name in ("scale", "shift"):
        spread = torch.stack([getattr(each, name) for each in shapes]).std(0)
        claimed = torch.stack([getattr(each, f"{name}_stderr") for each in shapes]).mean(0)
        assert_close(claimed / spread, torch.ones(3, dtype=torch.double), atol=0.2, rtol=0)


def test_the_error_of_the_mean_scale_knows_what_latents_have_to_do_with_each_other():
    """Of the same latent twice it is that of one."""
    found = ranked(LinearGaussian.random().vae(widen=0.8)).latents[:, :1]
    one, two = estimate_shape(found, 99), estimate_shape(found.repeat(1, 2), 99)
    assert_close(two.mean_scale, one.scale[0])
    assert_close(two.mean_scale_stderr, one.scale_stderr[0])


def test_the_prior_as_guide_passes_by_its_latents():
    """The blind spot of ranks of z: (z*, x) and (z, x) have the same marginals."""
    found = judge(ranked(prior_as_guide(), num_simulations=2000))
    assert float(found.adjusted[:-1].min()) > 0.01
    assert found.words[:-1] == ["calibrated"] * 3


def test_the_prior_as_guide_is_found_out_by_the_joint_density():
    found = judge(ranked(prior_as_guide(), num_simulations=2000))
    assert float(found.adjusted[-1]) < 1e-12
    assert "more probable than draws of the guide" in found.words[-1]


def test_the_worst_latent_comes_first():
    vae = LinearGaussian.random().vae()
    with torch.no_grad():
        vae.posterior.net.output.bias[1] += 0.3
    assert judge(ranked(vae)).worst[0] == 1


def test_the_verdict_of_an_exact_guide_claims_no_more_than_it_can():
    assert judge(ranked(LinearGaussian.random().vae())).verdict.startswith("no sign that the guide is not")


def test_latents_that_are_right_one_by_one_are_not_called_right_together():
    """Of a posterior with correlations, a diagonal guide with the marginals' scales."""
    oracle = LinearGaussian.random(orthogonal=False)
    found = judge(ranked(oracle.vae(), num_simulations=4000))
    assert found.words[:-1] == ["calibrated"] * 3
    assert "go together" in found.verdict


def test_a_single_draw_has_p_values_and_no_shape():
    found = judge(ranked(LinearGaussian.random().vae(shift=1.0), num_draws=1))
    assert found.shape is None
    assert found.p_value < 1e-3


# --- The band ---


def test_the_band_holds_uniform_ranks_as_often_as_it_says():
    """Of 2,000 calibrations 95%, within 4 errors of 0.5%, and never much more: its level is the largest that does."""
    N, M = 500, 99
    t, lower, upper = cumulative_band(N, M)
    generator = np.random.default_rng(5)
    below = (generator.integers(M + 1, size=(2000, N, 1)) < np.round(t.numpy() * (M + 1))).mean(1)
    inside = ((below >= lower.numpy()) & (below <= upper.numpy())).all(1).mean()
    assert 0.93 < inside < 0.98


def test_the_band_of_one_edge_is_the_binomials():
    t, lower, upper = cumulative_band(400, 1)
    assert_close(t, torch.tensor([0.5], dtype=torch.double))
    right = stats.binom(400, 0.5).ppf([0.025, 0.975]) / 400
    np.testing.assert_allclose([float(lower), float(upper)], right, atol=1.5 / 400)


# --- The figure ---


def test_the_figures_bars_are_densities_of_the_ranks_and_its_lines_start_and_end_at_zero():
    found = uniform_ranks(700, 100)
    at = bin_edges(700, 100)
    counts = count_ranks(found.all, at).double()
    t, lower, upper = cumulative_band(700, 100)
    below = counts.cumsum(-1)[:, :-1] / 700
    figure = calibration_ranks(
        {"joint": RankHistogram(counts[-1].numpy(), band=False)},
        shares=(at.diff().double() / 101).numpy(),
        edges=t.numpy(),
        lower=lower.numpy(),
        upper=upper.numpy(),
        latents=below[:-1].numpy(),
        joint=below[-1].numpy(),
        title="t",
    )
    bars, lines = figure.axes
    area = [bar.get_height() * bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(area, counts[-1] / 700)
    drawn = lines.get_lines()
    assert [line.get_ydata()[[0, -1]].tolist() for line in drawn[:4]] == [[0, 0]] * 4
    np.testing.assert_allclose(drawn[3].get_ydata()[1:-1], below[-1] - t)


def test_of_ranks_that_are_all_the_same_no_size_is_told():
    """A guide far from its posterior: how far, and how wide it is, the ranks do not say."""
    torch.manual_seed(0)
    others = torch.randint(0, 20, (500, 2))
    far = Ranks(torch.cat([others, torch.zeros(500, 1, dtype=torch.long)], 1), torch.randint(0, 20, (500,)), 19)
    found = judge(far)
    assert found.shape.scale.isnan().tolist() == found.shape.shift_stderr.isnan().tolist() == [False, False, True]
    assert found.words[2] == "off by more than the guide's draws reach: all ranks are the same"
    assert found.worst[0] == 2
    assert abs(found.shape.mean_scale - found.shape.scale[:2].mean()) < 1e-12
    assert "nan" not in found.verdict
