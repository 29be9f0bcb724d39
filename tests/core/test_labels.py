"""VAEs of labelled images, against a model of one linear-Gaussian per class."""

from __future__ import annotations

import pytest
import torch
from labelled_model import CLASSES, PROBS, D, K, L, exact_vae, labelled_images, log_p_x_given_y
from oracles import NormalFixed
from torch.testing import assert_close

from ppl_vae import Records, fit, log_evidence, log_weights
from ppl_vae.conditional import Conditional
from ppl_vae.evidence.missing import Observed
from ppl_vae.labels import ConditionalVAE
from ppl_vae.parts.labelled import ClassFlow, ClassNormals, LabelledDecoder, LabelledEncoder, append_label
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options
from ppl_vae.training import Optimizer


def test_log_weights_with_the_exact_guide_are_log_p_of_the_image_given_its_label():
    x, y = labelled_images()
    log_w = log_weights(*exact_vae().programs(), Records(x, y), 4)
    expected = log_p_x_given_y(x).gather(1, y[:, None])[:, 0]
    assert_close(log_w, expected.expand(4, -1), rtol=0, atol=1e-9)


def test_the_model_of_one_label_is_that_of_images_with_this_label():
    x, _ = labelled_images()
    one = exact_vae().fix_label(2)
    assert_close(log_evidence(one.model, one.guide, x, num_particles=3), CLASSES[2].log_evidence(x), rtol=0, atol=1e-9)


def test_the_model_of_a_label_that_is_no_class_is_refused():
    with pytest.raises(ValueError, match="label: expected a class from 0 to 2, got 3"):
        exact_vae().fix_label(3)


def test_functions_of_a_model_without_labels_refuse_one_with_labels():
    with pytest.raises(ValueError, match="takes labels"):
        Observed(exact_vae())


def test_a_label_is_appended_as_a_one_hot_vector_and_an_unknown_one_as_zeros():
    h = torch.randn(4, 2, 5)
    joined = append_label(h, torch.tensor([1, -1]), K)
    assert torch.equal(joined[..., :5], h)
    assert torch.equal(joined[3, :, 5:], torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_labels_with_a_dimension_of_their_own_broadcast_to_every_image():
    encoder = LabelledEncoder(MLP(D, 7, hidden=(5,)), MLP(7 + K, 4, hidden=(5,)), K)
    decoder = LabelledDecoder(MLP(L + K, D, hidden=()), K)
    x, every = torch.randn(8, D), torch.arange(K)[:, None]
    h = encoder(x, every)
    assert h.shape == (K, 8, 4)
    assert_close(h[1], encoder(x, torch.ones(8, dtype=torch.long)))
    assert decoder(torch.randn(5, 1, 8, L), every).shape == (5, K, 8, D)


def test_the_flow_prior_of_classes_has_the_density_of_its_draws():
    """By change of variables: z = f(u) with f's volume from autograd, u ~ N(m_y, s_y^2)."""
    prior = build_vae(
        Options(condition="labels", classes=K, latent_dim=L, prior_layers=2, prior_hidden=(4,)), (D,)
    ).prior
    assert isinstance(prior, ClassFlow)
    prior = prior.double()
    with torch.no_grad():
        for w in prior.parameters():
            w.add_(0.3 * torch.randn_like(w))
    y = torch.tensor([0, 2, 1])
    u = prior.base(y).sample()
    volume = torch.stack([torch.autograd.functional.jacobian(lambda v: prior.flow(v)[0], one) for one in u])
    expected = prior.base(y).log_prob(u) - volume.det().abs().log()
    assert_close(prior(y).log_prob(prior.flow(u)[0]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("network", "prior"),
    [("mlp", "standard-normal"), ("gated", "mixture"), ("conv", "flow"), ("gated-residual", "flow")],
)
def test_training_separates_classes_that_only_the_label_tells_apart(network, prior):
    """Class 0 is black and class 1 white: log p(x | y) of the right label is then far higher."""
    torch.manual_seed(0)
    words = {"prior_components": 3} if prior == "mixture" else {"prior_layers": 2} if prior == "flow" else {}
    asked = Options(
        condition="labels", classes=2, network=network, prior=prior, hidden=(8,), channels=(2, 3), latent_dim=2, **words
    )
    vae = build_vae(asked, (1, 4, 4))
    y = torch.arange(40) % 2
    x = y.float()[:, None, None, None].expand(40, 1, 4, 4).contiguous()
    fit(vae, Records(x, y), epochs=60, optimizer=Optimizer(learning_rate=0.03))
    right, wrong = (
        log_evidence(vae.model, vae.guide, Records(x, label), num_particles=5).mean() for label in (y, 1 - y)
    )
    assert right > wrong + 3


def test_a_prior_and_networks_of_float64_are_closed_form_for_a_linear_model():
    """The parts of ``build_vae``: a linear decoder of (z, one-hot y), whose log p(x | y) is a normal's."""
    torch.manual_seed(1)
    decoder = LabelledDecoder(MLP(L + K, D, hidden=()).double(), K)
    encoder = LabelledEncoder(MLP(D, 4, hidden=()), MLP(4 + K, 2 * L, hidden=(6,)), K).double()
    prior = ClassNormals(K, L).double()
    with torch.no_grad():
        prior.loc.normal_()
        prior.log_scale.normal_(std=0.3)
    parts = Conditional(decoder, NormalFixed((D,), 0.7)), Conditional(encoder, DiagonalNormal(L))
    vae = ConditionalVAE(prior, *parts, PROBS)
    x, y = torch.randn(4, D).double(), torch.tensor([0, 1, 2, 1])
    W, B, b = decoder.net.output.weight[:, :L], decoder.net.output.weight[:, L:], decoder.net.output.bias
    loc, scale = prior(y).base_dist.loc, prior(y).base_dist.scale
    covariance = (W * scale[:, None] ** 2) @ W.T + 0.49 * torch.eye(D).double()
    exact = torch.distributions.MultivariateNormal(loc @ W.T + B.T[y] + b, covariance).log_prob(x).detach()
    bound = log_evidence(vae.model, vae.guide, Records(x, y), num_particles=200_000)
    assert_close(bound, exact, rtol=0, atol=0.05)
