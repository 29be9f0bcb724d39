"""Bounds on log p(x) from importance weights, with their errors, for any Pyro model and guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyro
import torch
from torch import Tensor

from ppl_vae.protocols import Program, StochasticFunction
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.numerics import LogWeightSummary
from ppl_vae.runtime.records import Data
from ppl_vae.support import check_support
from ppl_vae.weights import count_branches, log_weight_terms

# An image is unreliable where its bound is estimated to lie more than this many nats below log p(x). Source: ours.
UNRELIABLE_BIAS = 0.5

# The fields of ``Importance`` under the names that files hold them by.
IMPORTANCE_NAMES = (
    *("log_evidence", "elbo", "reconstruction", "kl", "ess", "pareto_k", "monte_carlo_stderr", "bias"),
    "rise",  # the tenfold gain
)

_SUMMARY_SIZE = 10_000  # log-weights that are summarized at once

Terms = Callable[[StochasticFunction, StochasticFunction, Data, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, repr=False)
class Importance:
    """What S particles say about each image; every field is (N,), float64, in nats where no other unit is given.

    The Monte Carlo error and the bias assume weights with a variance, k below 0.5. Above, as for most images of a
    trained VAE, they are lower bounds. The tenfold gain makes no such assumption.

    Args:
        log_evidence: L_S, whose expectation is a lower bound on log p(x) that rises with S.
        elbo: ``reconstruction`` - ``kl``, over the same particles.
        reconstruction: E_q[log p(x | z)].
        kl: E_q[log q(z | x) - log p(z)].
        ess: The effective sample size, from 1 to S.
        pareto_k: k-hat, the estimated tail index of the weights; NaN below 21 particles.
        monte_carlo_stderr: The delta method's error of L_S over draws of the particles; NaN for one particle.
        bias: The jackknife's estimate of log p(x) - E[L_S], not below 0; NaN for one particle.
        tenfold_gain: L_S minus the mean of the ten L_{S/10} from tenths of the same particles; NaN below 10.
        num_particles: S, where it is known.
    """

    log_evidence: Tensor
    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor
    ess: Tensor
    pareto_k: Tensor
    monte_carlo_stderr: Tensor
    bias: Tensor
    tenfold_gain: Tensor
    num_particles: int | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        N, S, bound = len(self.log_evidence), self.num_particles or "S", self.log_evidence.double()
        error = f" ± {float(bound.std()) / N**0.5:.2f} (standard error over images)" if N > 1 else ""
        return (
            f"Importance of {N:,} image{'s' * (N != 1)}: L_{S} {float(bound.mean()):.2f}{error} nats per image, in "
            f"expectation below log p(x)\n  ELBO {float(self.elbo.mean()):.2f}; effective particles: median "
            f"{float(self.ess.median()):.1f} of {S}; Pareto k-hat: median {float(self.pareto_k.median()):.2f}"
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The fields by the names that files hold them under."""
        return dict(zip(IMPORTANCE_NAMES, self._tensors(), strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Importance:
        """The inverse of ``to_tensors``."""
        return cls(*(tensors[name] for name in IMPORTANCE_NAMES))

    def cpu(self) -> Importance:
        """The same, on the CPU."""
        return self.map(Tensor.cpu)

    def map(self, function: Callable[[Tensor], Tensor]) -> Importance:
        """The same with each tensor as the function returns it, of any shape."""
        return Importance(*map(function, self._tensors()), num_particles=self.num_particles)

    def _tensors(self) -> list[Tensor]:
        return [values for values in vars(self).values() if isinstance(values, Tensor)]

    def unreliable(self) -> Tensor:
        """(N,) bool: where the jackknife's bias is above 0.5 nats, or NaN.

        With k-hat above 0.5 this is a rough sieve: a flagged image may be fine, and a passed one may lack as much.
        """
        return ~(self.bias <= UNRELIABLE_BIAS)

    def jackknife_estimate(self) -> Tensor:
        """(N,) L_S + the jackknife's bias, nats: an estimate of log p(x), which may lie above it (Nowozin 2018)."""
        return self.log_evidence + self.bias


@serialize_threads(gradients=False)
def importance(
    model: StochasticFunction,
    guide: StochasticFunction,
    x: Data,
    *,
    num_particles: int,
    chunk: int | None = None,
    terms: Terms = log_weight_terms,
) -> Importance:
    """L_S = log (1/S) sum_s p(x, z_s) / q(z_s | x), z_s ~ q(z | x), for each image, with its errors.

    Log-weights are streamed, so memory does not grow with S. Draws come from torch's global generator. No gradients are
    kept. Networks with dropout or batch norm should be in evaluation mode.

    Args:
        model: A Pyro program over x with one data plate at dim=-1.
        guide: A Pyro program over x that samples every latent site of the model.
        x: Images (N, *E), or ``Records``.
        num_particles: S.
        chunk: The most particles per image that are held at once; by default as many as fit into one pass.
        terms: Gives the two parts of the log-weights, such as ``evaluation.CapturedTerms``.

    Returns:
        ``Importance``, each field (N,).

    Raises:
        ValueError: An image is off the support of p(x | z), as in ``log_weights``, or an argument is out of its range.
        DeterministicGuide: A ValueError: the guide has no density.
        NotFinite: A log-weight is NaN or +infinity.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    num_particles = check_count("num_particles", num_particles)
    chunk = chunk if chunk is None else check_count("chunk", chunk)
    check_support(model, x)
    pairs = max(1, pairs_per_pass(getattr(model, "__self__", None), x) // count_branches(model, guide, x))
    chunk = min(num_particles, chunk or pairs)
    # Allocated before the work: small tensors that are kept between large ones would fragment memory.
    results = torch.empty(len(IMPORTANCE_NAMES), len(x), dtype=torch.double, device=x.device)
    group = max(1, pairs // chunk)
    for images, place in zip(x.split(group), results.split(group, dim=1), strict=True):
        torch.stack(measure_group(model, guide, images, num_particles, chunk, terms), out=place)
    return Importance(*results, num_particles=num_particles)


def log_evidence(
    model: StochasticFunction, guide: StochasticFunction, x: Data, *, num_particles: int, chunk: int | None = None
) -> Tensor:
    """The bound L_S for each image: (N,) nats.

    Args: as ``importance``, whose errors are these too.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    return importance(model, guide, x, num_particles=num_particles, chunk=chunk).log_evidence


def measure_group(
    model: StochasticFunction, guide: StochasticFunction, x: Data, num_particles: int, chunk: int, terms: Terms
) -> tuple[Tensor, ...]:
    """The fields of ``Importance``, (B,) each, for images (B, *E) that are held at once."""
    summary, reconstruction, kl = _summarize(model, guide, x, num_particles, chunk, terms)
    return (
        summary.log_mean_exp(),
        reconstruction - kl,
        reconstruction,
        kl,
        summary.effective_sample_size(),
        summary.pareto_k(),
        summary.monte_carlo_stderr(),
        summary.bias(),
        summary.tenfold_gain(),
    )


def _summarize(
    model: StochasticFunction, guide: StochasticFunction, x: Data, num_particles: int, chunk: int, terms: Terms
) -> tuple[LogWeightSummary, Tensor, Tensor]:
    """A summary of S log-weights per image, and the means of log p(x | z) and of log q(z | x) - log p(z), (B,)."""
    summary = LogWeightSummary(num_particles, len(x), device=x.device)
    reconstruction = torch.zeros(len(x), dtype=torch.double, device=x.device)
    kl = torch.zeros_like(reconstruction)
    starts = range(0, num_particles, chunk)
    passes = max(1, _SUMMARY_SIZE // (len(x) * chunk))  # one summary costs nearly the same for one pass as for several
    for first in range(0, len(starts), passes):
        parts = [terms(model, guide, x, min(chunk, num_particles - start)) for start in starts[first : first + passes]]
        log_p_x_given_z, log_p_z_over_q_z = (torch.cat(part) for part in zip(*parts, strict=True))
        log_w = log_p_x_given_z + log_p_z_over_q_z
        if log_w.isnan().any() or log_w.isposinf().any():
            raise NotFinite(
                "log-weights: expected numbers, got NaN or +infinity; the weights or the data hold values that are "
                "not finite"
            )
        summary.update(log_w)
        reconstruction += log_p_x_given_z.double().sum(0) / num_particles
        kl -= log_p_z_over_q_z.double().sum(0) / num_particles
    return summary, reconstruction, kl


@serialize_threads(gradients=False)
def gather_log_weights(vae: Program, x: Data, num_particles: int) -> Tensor:
    """(S, N) log-weights, nats, in passes that fit into memory. x: (N, *E)."""
    check_support(vae.model, x)
    pairs = pairs_per_pass(vae, x)
    chunk = max(1, pairs // len(x))
    parts = []
    with pyro.validation_enabled(False):
        for start in range(0, num_particles, chunk):
            S = min(chunk, num_particles - start)
            terms = (log_weight_terms(vae.model, vae.guide, group, S) for group in x.split(pairs))
            parts.append(torch.cat([log_p_x + log_ratio for log_p_x, log_ratio in terms], dim=1))
    return torch.cat(parts)
