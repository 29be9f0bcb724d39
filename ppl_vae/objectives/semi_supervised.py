"""The loss of a semi-supervised VAE: its ELBO and the loss of its classifier."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Categorical

from ppl_vae.labels import SemiSupervisedVAE
from ppl_vae.objectives.importance import EnumeratedELBO, module_of
from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.ranks import mean_over_batch


class SemiSupervisedELBO(EnumeratedELBO):
    """The ELBO of a ``SemiSupervisedVAE`` and the loss of its classifier q(y | x), as a Pyro loss.

        -ELBO + a sum_b [-log q(y_l | x_l) + c (S(x_b) + 0.4 H(q(y | x_b)) + 1.6 KL(q(y) || p(y)))]

    (x_l, y_l) is a labelled image that is paired with image b, and q(y) = mean_b q(y | x_b). The first term teaches the
    labels. The others use all images: S makes nearby images share a label, H makes each label certain, and the KL makes
    all classes occur. Without them (c = 0, plain M2) the sum over y finds clusters that are no classes.

        S(x) = KL(q(y | x) || q(y | x + d)),   |d| = r

    d has the direction in which this KL grows fastest, seen from a random point at that distance. r is an eighth of the
    typical distance of two images of the batch, sqrt(2 sum_d Var x_d); columns of a table should have one unit.

    Args:
        num_particles: As ``EnumeratedELBO``.
        label_weight: a, in nats of the ELBO.
        consistency: c.

    Raises:
        ValueError: When the loss is computed: the program is another, or as ``EnumeratedELBO``.

    Reference: Kingma et al. 2014, arXiv 1406.5298, equation 9 (the first term); Miyato et al. 2018, arXiv 1704.03976
    (S); Hu et al. 2017, arXiv 1702.08720 (S with the other two). The weights 0.4 and 1.6 and the rule for r are ours.
    """

    def __init__(self, num_particles: int = 1, *, label_weight: float, consistency: float = 1.0) -> None:
        super().__init__(num_particles)
        self.label_weight, self.consistency = label_weight, consistency

    def differentiable_loss(
        self, model: StochasticFunction, guide: StochasticFunction, x: Tensor, *further: Tensor
    ) -> Tensor:
        """The loss of images x, (B, *E): a 0-d tensor, nats.

        ``further``: the labels (B,), -1 where unknown, and for each image a labelled one (B, *E) and its label (B,).
        """
        y, labelled_x, labelled_y = further
        vae = module_of(guide)
        if not isinstance(vae, SemiSupervisedVAE):
            raise ValueError(f"program: expected a SemiSupervisedVAE, got {type(vae).__name__}")
        terms = -vae.classifier(labelled_x.to(x)).log_prob(labelled_y)
        if self.consistency:
            terms = terms + self.consistency * _inconsistency(vae, x)
        return super().differentiable_loss(model, guide, x, y) + self.label_weight * terms.sum()


def _inconsistency(vae: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """S + 0.4 H + 1.6 KL of ``SemiSupervisedELBO``, (B,) nats."""
    q = vae.classifier(x)
    mean_q = mean_over_batch(q.probs.mean(0))
    # Its gradient is that of KL(q(y) || p(y)): the gradient through log q(y) sums to 0.
    balance = (q.probs * (mean_q / vae.class_probs).clamp(min=_SMALLEST).log()).sum(-1)
    return _smoothness(vae.classifier, x) + 0.4 * q.entropy() + 1.6 * balance


_SMALLEST = 1e-9  # of a share whose logarithm is taken, and of a length that divides: a class may be absent


def _smoothness(classifier: Callable[[Tensor], Categorical], x: Tensor) -> Tensor:
    """S(x) of ``SemiSupervisedELBO``, (B,) nats, without a gradient through q(y | x) itself."""
    with pyro.plate("directions", len(x), dim=-1):
        d = pyro.sample("direction", dist.Normal(torch.zeros_like(x), 1.0).to_event(x.dim() - 1))
    variance = mean_over_batch((x - mean_over_batch(x.mean(0))).square().mean(0))
    radius = (2 * variance.sum()).sqrt() / 8
    with torch.autocast(x.device.type, enabled=False):  # small changes need all digits
        fixed_q = dist.Categorical(logits=classifier(x).logits.detach())

        def change(d: Tensor) -> Tensor:
            # Not torch's kl_divergence, which is infinite where a probability underflows.
            return (fixed_q.probs * (fixed_q.logits - classifier(x + d).logits)).sum(-1)

        steepest = torch.func.grad(lambda d: change(d).sum())(radius * _unit(d)).detach()
        return change(radius * _unit(steepest))


def _unit(d: Tensor) -> Tensor:
    flat = d.flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True).clamp(min=_SMALLEST)).view_as(d)
