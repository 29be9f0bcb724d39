"""log p(x) and p(y | x) from log p(x | y) of every class, against one linear-Gaussian model per class."""

from __future__ import annotations

import itertools

import pyro.distributions as dist
import torch
from labelled_model import PROBS, K, exact_vae, labelled_images, log_p_x_given_y
from torch.testing import assert_close

from ppl_vae import Records
from ppl_vae.evidence.classes import ClassEvidence, count_confusions
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.importance import IMPORTANCE_NAMES, Importance
from ppl_vae.runtime.records import EachLabel


def measured(x, S=20):
    rows = evaluate(exact_vae().eval(), EachLabel(x, K), num_particles=S, seed=0)
    return ClassEvidence.gather(rows, PROBS)


def random_evidence(N=5, S=20):
    torch.manual_seed(0)
    fields = {name: torch.randn(N, K).double() for name in IMPORTANCE_NAMES}
    fields["kl"] = fields["reconstruction"] - fields["elbo"]
    return ClassEvidence(Importance.from_tensors(fields), PROBS.log())


def test_with_the_exact_guide_log_p_x_and_the_classifier_are_the_closed_form():
    x, y = labelled_images()
    joint = PROBS.log() + log_p_x_given_y(x)
    found = measured(x)
    assert_close(found.given.log_evidence, log_p_x_given_y(x), rtol=0, atol=1e-9)
    assert_close(found.marginal().log_evidence, joint.logsumexp(1), rtol=0, atol=1e-9)
    assert_close(found.log_posterior(), joint.log_softmax(1), rtol=0, atol=1e-9)
    assert_close(
        found.given_label(y).log_evidence, joint.gather(1, y[:, None])[:, 0] - PROBS.log()[y], rtol=0, atol=1e-9
    )


def test_the_elbo_of_the_exact_guides_is_log_p_x_and_nothing_is_lacking():
    x, _ = labelled_images()
    found, exact = measured(x).marginal(), (PROBS.log() + log_p_x_given_y(x)).logsumexp(1)
    assert_close(found.elbo, exact, rtol=0, atol=1e-9)
    assert_close(found.elbo, found.reconstruction - found.kl, rtol=0, atol=1e-9)
    for name in ("monte_carlo_stderr", "bias", "tenfold_gain"):
        assert_close(getattr(found, name), torch.zeros(len(x)).double(), rtol=0, atol=1e-7)


def test_the_elbo_is_that_of_the_best_probabilities_of_the_labels():
    """Against a search over q(y | x): sum_y q(y) (ELBO_y + log p(y) - log q(y))."""
    found = random_evidence()
    weights = torch.tensor([w for w in itertools.product(range(1, 60), repeat=K) if sum(w) == 60]).double() / 60
    bounds = (weights * (found.given.elbo[:, None] + found.log_prior - weights.log())).sum(-1)
    best = bounds.amax(1)
    assert (found.marginal().elbo >= best - 1e-12).all()
    assert_close(found.marginal().elbo, best, rtol=0, atol=2e-3)


def test_the_monte_carlo_error_is_that_of_propagated_noise():
    """Against draws of L_S with these errors for each class, 20,000 of them."""
    found = random_evidence()
    small = vars(found.given) | {"monte_carlo_stderr": found.given.monte_carlo_stderr.abs() * 0.01}
    found = ClassEvidence(Importance(**small), found.log_prior)
    noise = torch.randn(20_000, *found.given.log_evidence.shape).double() * found.given.monte_carlo_stderr
    spread = (found.log_prior + found.given.log_evidence + noise).logsumexp(2).std(0)
    assert_close(found.marginal().monte_carlo_stderr, spread, rtol=0.03, atol=0)


def test_what_is_lacking_is_the_fall_of_a_sum_of_noisy_means():
    """Against draws of unbiased means of each class, whose logarithms lack 0.01 to 0.04 nats by themselves."""
    found = random_evidence()
    lacks = torch.tensor([0.01, 0.02, 0.04]).double()
    found.given.bias[:] = lacks
    noise = dist.Gamma(1 / (2 * lacks), 1 / (2 * lacks)).sample((200_000,))  # mean 1, variance 2 lacks
    r = found.log_posterior().exp()
    fall = -(r * noise[:, None]).sum(-1).log().mean(0)
    assert_close(found.marginal().bias, fall, rtol=0.05, atol=5e-4)


def test_unknown_k_hats_are_left_out_of_the_mean():
    found = random_evidence()
    found.given.pareto_k[0, 1] = torch.nan
    found.given.pareto_k[1] = torch.nan
    k, r = found.marginal().pareto_k, found.log_posterior().exp()
    expected = (r[0, [0, 2]] * found.given.pareto_k[0, [0, 2]]).sum() / r[0, [0, 2]].sum()
    assert_close(k[0], expected)
    assert k[1].isnan()
    assert not k[2:].isnan().any()


def test_each_label_is_the_records_written_out():
    x, _ = labelled_images(7)
    data, written = EachLabel(x, K), Records(x.repeat_interleave(K, 0), torch.arange(K).repeat(7))
    assert len(data) == len(written) == 21
    assert data.shape == written.shape
    for rows in (slice(4, 11), slice(20, 30), torch.tensor([3, 0])):
        assert torch.equal(data[rows].x, written[rows].x)
        assert torch.equal(data[rows].further[0], written[rows].further[0])
    parts = zip(data.split(5), written.split(5), strict=True)
    assert all(torch.equal(one.x, two.x) and torch.equal(one.further[0], two.further[0]) for one, two in parts)


def test_confusions_are_counted_by_label_and_predicted_label():
    y, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 0])
    assert count_confusions(y, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
