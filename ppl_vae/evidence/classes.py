"""log p(x) and the classifier p(y | x) of a ``ConditionalVAE``, from log p(x | y) of every class y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical

from ppl_vae.evidence.importance import Importance


@dataclass(frozen=True)
class ClassEvidence:
    """Estimates of log p(x | y) for every image and each of K labels, from S particles.

        log p(x) = log sum_y p(y) p(x | y),    p(y | x) = p(y) p(x | y) / p(x)

    The sum is exact, and each p(x | y) the mean of S importance weights, which is unbiased. The bound on log p(x) is
    therefore below it in expectation.

    Args:
        given: Each field (N, K), of log p(x | y).
        log_prior: (K,) log p(y), float64.
    """

    given: Importance
    log_prior: Tensor

    @classmethod
    def gather(cls, rows: Importance, class_probs: Tensor) -> ClassEvidence:
        """From fields (N K,) of ``EachLabel``, and p(y), (K,)."""
        given = rows.map(lambda values: values.reshape(-1, len(class_probs)))
        return cls(given, class_probs.double().log().to(rows.log_evidence.device))

    def log_posterior(self) -> Tensor:
        """(N, K) log p(y | x)."""
        return (self.log_prior + self.given.log_evidence).log_softmax(1)

    def given_label(self, y: Tensor) -> Importance:
        """Each field (N,), of log p(x | y) for one label y of each image, (N,)."""
        return self.given.map(lambda values: values.gather(1, y[:, None])[:, 0])

    def marginal(self) -> Importance:
        """Each field (N,), of log p(x).

        The latents are y and z here, and the guide q(y | x) q(z | x, y) has the q(y | x) with the highest ELBO, log
        sum_y p(y) exp(ELBO_y). Effective sample size and k-hat are means under p(y | x). Monte Carlo error and bias are
        those of the sum by the delta method. The tenfold gain is that of the sum of mean bounds, an upper bound on it.
        """
        given, log_r = self.given, self.log_posterior()
        r, q = log_r.exp(), (self.log_prior + given.elbo).softmax(1)
        log_evidence = (self.log_prior + given.log_evidence).logsumexp(1)
        elbo = (self.log_prior + given.elbo).logsumexp(1)
        reconstruction = (q * given.reconstruction).sum(1)
        before = (self.log_prior + given.log_evidence - given.tenfold_gain).logsumexp(1)
        return Importance(
            log_evidence=log_evidence,
            elbo=elbo,
            reconstruction=reconstruction,
            kl=reconstruction - elbo,
            ess=(r * given.ess).sum(1),
            pareto_k=_mean_of_known(given.pareto_k, r),
            monte_carlo_stderr=(r * given.monte_carlo_stderr).square().sum(1).sqrt(),
            bias=(r.square() * given.bias).sum(1),
            tenfold_gain=log_evidence - before,
            num_particles=given.num_particles,
        )


def _mean_of_known(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over the last dimension of values that are not NaN; NaN where all are."""
    known = ~values.isnan()
    return torch.where(known, weights * values, 0.0).sum(-1) / torch.where(known, weights, 0.0).sum(-1)


_CHUNK = 1000  # images


@torch.no_grad()
def classify(classifier: Callable[[Tensor], Categorical], x: Tensor) -> Tensor:
    """(N,) the most probable label of each image of x (N, *E) by q(y | x)."""
    return torch.cat([classifier(part).logits.argmax(-1) for part in x.split(_CHUNK)])


def count_confusions(y: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64: how many images of each class (row) are taken for each class (column)."""
    return (y * num_classes + predicted).bincount(minlength=num_classes**2).reshape(num_classes, num_classes)
