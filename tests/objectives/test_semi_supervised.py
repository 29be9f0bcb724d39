"""The semi-supervised VAE and its loss, against closed forms, Pyro's own sum over labels and plain formulas."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from labelled_model import CLASSES, PROBS, D, K, L, OfClass, labelled_images, log_p_x_given_y
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.testing import assert_close

from ppl_vae import Records, fit, log_weights
from ppl_vae.conditional import Conditional
from ppl_vae.labels import SemiSupervisedVAE
from ppl_vae.objectives import EnumeratedELBO, SemiSupervisedELBO
from ppl_vae.parts.labelled import Classes, ClassNormals
from ppl_vae.runtime.records import UNKNOWN
from ppl_vae.training import Optimizer, Schedule

EXACT = {"rtol": 0, "atol": 1e-9}


class ExactClasses(nn.Module):
    """p(y | x) in closed form, up to its normalization."""

    def forward(self, x):
        return torch.stack([one.log_evidence(x) for one in CLASSES], dim=-1) + PROBS.log()


def exact_vae():
    """The model whose guide q(y | x) q(z | x, y) is the exact posterior."""
    classifier = Conditional(ExactClasses(), Classes(K))
    return SemiSupervisedVAE(
        ClassNormals(K, L).double(), OfClass("likelihood"), OfClass("posterior"), PROBS, classifier
    )


def trained_parts(seed=0):
    """A model with weights to train, in double precision."""
    pyro.set_rng_seed(seed)
    classifier = Conditional(nn.Linear(D, K), Classes(K))
    vae = SemiSupervisedVAE(ClassNormals(K, L), OfClass("likelihood"), OfClass("posterior"), PROBS, classifier)
    return vae.double()


def test_the_elbo_of_the_exact_guide_is_log_p_of_image_and_label_where_it_is_known_and_of_the_image_elsewhere():
    vae, (x, y) = exact_vae(), labelled_images()
    known = torch.arange(len(x)) < 5
    given = torch.where(known, y, UNKNOWN)
    elbo = -EnumeratedELBO().differentiable_loss(vae.model, vae.guide, x, given)
    joint = log_p_x_given_y(x) + PROBS.log()
    expected = torch.where(known, joint.gather(1, y[:, None])[:, 0], joint.logsumexp(1))
    assert_close(elbo, expected.sum(), **EXACT)


def test_log_weights_are_log_p_of_the_image_whether_its_label_is_known_or_not():
    vae, (x, y) = exact_vae(), labelled_images()
    expected = (log_p_x_given_y(x) + PROBS.log()).logsumexp(1)
    for given in (y, torch.full_like(y, UNKNOWN)):
        assert_close(log_weights(vae.model, vae.guide, Records(x, given), 2), expected.expand(2, -1), **EXACT)


def test_the_gradient_of_the_elbo_is_that_of_pyros_sum_over_labels():
    vae, (x, y) = trained_parts(), labelled_images()
    given = torch.where(torch.arange(len(x)) < 5, y, UNKNOWN)
    found = {}
    for name, loss in (("ours", EnumeratedELBO()), ("pyro", TraceEnum_ELBO(max_plate_nesting=1))):
        vae.zero_grad()
        pyro.set_rng_seed(3)
        loss.differentiable_loss(vae.model, vae.guide, x, given).backward()
        found[name] = {n: w.grad.clone() for n, w in vae.named_parameters() if w.grad is not None}
    assert found["ours"].keys() == found["pyro"].keys() != set()
    for name in found["ours"]:
        assert_close(found["ours"][name], found["pyro"][name], rtol=0, atol=1e-6)


def test_the_loss_of_a_linear_classifier_is_the_sum_of_its_four_terms():
    vae, (x, y), weight = trained_parts(), labelled_images(40), 7.0
    labelled_x, labelled_y = x.flip(0), y.flip(0)
    unknown = torch.full_like(y, UNKNOWN)
    pyro.set_rng_seed(5)
    loss = SemiSupervisedELBO(label_weight=weight).differentiable_loss(
        vae.model, vae.guide, x, unknown, labelled_x, labelled_y
    )
    zero = SemiSupervisedELBO(label_weight=0.0)
    pyro.set_rng_seed(5)
    elbo = zero.differentiable_loss(vae.model, vae.guide, x, unknown, labelled_x, labelled_y)
    net = vae.classifier.net
    q = net(x).softmax(-1)
    given = -net(labelled_x).log_softmax(-1).gather(1, labelled_y[:, None]).sum()
    entropy = -(q * q.log()).sum()
    balance = len(x) * (q.mean(0) * (q.mean(0) / PROBS).log()).sum()
    smooth = (loss - elbo) / weight - given - 0.4 * entropy - 1.6 * balance
    radius = (2 * x.var(0, correction=0).sum()).sqrt() / 8
    assert 0 < smooth.item() <= largest_change(net, x, q, radius).item() * (1 + 1e-6)
    assert smooth.item() > 0.7 * largest_change(net, x, q, radius).item()


def largest_change(net, x, q, radius):
    """The largest KL(q(y | x) || q(y | x + d)) over directions d of that length, summed."""
    basis = torch.linalg.qr(net.weight.T).Q  # (D, K): other directions change nothing
    d = torch.randn(4000, K, dtype=x.dtype, generator=torch.Generator().manual_seed(0)) @ basis.T
    d = radius * d / d.norm(dim=1, keepdim=True)
    other = net(x + d[:, None]).log_softmax(-1)  # (4000, N, K)
    return (q * (q.log() - other)).sum(-1).amax(0).sum()


class Table(nn.Module):
    """A classifier with logits of its own for each image, which is numbered by its first pixel."""

    def __init__(self, N):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(N, K, dtype=torch.double))

    def forward(self, x):
        return self.logits[x[:, 0].round().long().clamp(0, len(self.logits) - 1)]


def test_the_gradient_of_a_classifier_that_small_changes_leave_alone_is_that_of_the_plain_formula():
    (x, y), vae = labelled_images(8), trained_parts()
    x = torch.cat([10.0 * torch.arange(8.0)[:, None], x[:, 1:]], dim=1)
    net = Table(71)
    vae.classifier = Conditional(net, Classes(K))
    unknown = torch.full_like(y, UNKNOWN)

    def gradient(loss):
        net.zero_grad()
        pyro.set_rng_seed(9)
        loss().backward()
        return net.logits.grad.clone()

    def ours(weight):
        loss = SemiSupervisedELBO(label_weight=weight)
        return gradient(lambda: loss.differentiable_loss(vae.model, vae.guide, x, unknown, x.flip(0), y.flip(0)))

    def plain():
        q = net(x).softmax(-1)
        mean = q.mean(0)
        given = -net(x).log_softmax(-1).gather(1, y[:, None]).sum()
        return given - 0.4 * (q * q.log()).sum() + 1.6 * len(x) * (mean * (mean / PROBS).log()).sum()

    assert_close(ours(1.0) - ours(0.0), gradient(plain), **EXACT)


def test_the_gradient_is_finite_where_a_probability_underflows():
    (x, y), vae = labelled_images(8), trained_parts()
    with torch.no_grad():
        vae.classifier.net.weight.mul_(1e4)
    loss = SemiSupervisedELBO(label_weight=1.0)
    assert (vae.classifier(x).probs == 0).any()
    loss.differentiable_loss(vae.model, vae.guide, x, torch.full_like(y, UNKNOWN), x, y).backward()
    assert vae.classifier.net.weight.grad.isfinite().all()


def test_a_training_finds_classes_that_few_labels_name():
    pyro.set_rng_seed(0)
    centers = 4.0 * torch.eye(K, D)
    truth = torch.arange(600) % K
    x = centers[truth] + torch.randn(600, D)
    given = torch.full_like(truth, UNKNOWN)
    given[:K] = truth[:K]
    turns = torch.arange(600) % K
    prior, likelihood, posterior = ClassNormals(K, L), Shifted(), Flat()
    vae = SemiSupervisedVAE(
        prior, likelihood, posterior, torch.full((K,), 1 / K), Conditional(nn.Linear(D, K), Classes(K))
    )
    records = Records(x, given, x[turns], truth[turns])
    fit(
        vae,
        records,
        epochs=15,
        objective=SemiSupervisedELBO(label_weight=20.0),
        optimizer=Optimizer(learning_rate=2e-2),
        schedule=Schedule(batch_size=50),
    )
    assert (vae.classifier(x).logits.argmax(-1) == truth).float().mean() > 0.95


class Shifted(nn.Module):
    """p(x | z, y) = N(x; W z + m_y, I)."""

    def __init__(self):
        super().__init__()
        self.net, self.loc = nn.Linear(L, D), nn.Parameter(torch.zeros(K, D))

    def forward(self, z, y):
        return dist.Normal(self.net(z) + self.loc[y], 1.0).to_event(1)


class Flat(nn.Module):
    """q(z | x, y) = N(A x + b_y, s)."""

    def __init__(self):
        super().__init__()
        self.net, self.loc = nn.Linear(D, L), nn.Parameter(torch.zeros(K, L))
        self.log_scale = nn.Parameter(torch.zeros(L))

    def forward(self, x, y):
        return dist.Normal(self.net(x) + self.loc[y], self.log_scale.exp()).to_event(1)
