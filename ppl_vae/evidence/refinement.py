"""Refine the guide for each image by gradients, and split log p(x) - ELBO by what that gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppl_vae.evidence.importance import importance
from ppl_vae.evidence.moments import encode
from ppl_vae.evidence.proposals import Proposal, normal_features, replace_guide
from ppl_vae.parts.posteriors import DiagonalNormal, FullNormal
from ppl_vae.protocols import Family, LatentModel, check_latent_model
from ppl_vae.runtime.batching import even_block_size, images_per_pass, pairs_per_pass
from ppl_vae.runtime.capture import compile_function, detach_tensors, replace_tensors
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import evaluation_mode, serialize_threads
from ppl_vae.runtime.records import Data, arguments_of
from ppl_vae.support import check_support
from ppl_vae.weights import DeterministicGuide, is_deterministic

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam
_COMPARISON_PARTICLES = 500  # per image, for each of the two q that are compared at the end


@serialize_threads()
def refine_proposal(
    vae: LatentModel,
    x: Data,
    *,
    steps: int = 300,
    num_particles: int = 8,
    family: DiagonalNormal | FullNormal | None = None,
    learning_rate: float = 0.05,
    compile: bool = False,
) -> Proposal:
    """h_n* = argmax_h ELBO_n(h) for q(z | x_n) = family(h), separately for each image.

    The features h start at the encoder's, net(x_n), and follow Adam with a learning rate that falls to zero, along
    reparametrized gradients without the score of q. Nothing else changes, not even the layers of a flow guide. At the
    end each image keeps the better of the start and the refined q, judged by 500 fresh draws of each. Draws come from
    torch's global generator.

    Args:
        vae: A VAE with a guide ``Conditional(net, family)``, or any VAE where ``family`` is given.
        x: Images (N, *E), or ``Records``.
        steps: The number of steps.
        num_particles: k, draws per image and step.
        family: A family of normals with L latents, which start at the guide's moments; by default the guide's family.
        learning_rate: The first one.
        compile: Whether a step is one compiled graph.

    Reference: Cremer et al. 2018, arXiv 1801.03558, section 4; Kim et al. 2018, arXiv 1802.02550. The gradients: Roeder
    et al. 2017, arXiv 1703.09194.
    """
    check_latent_model(vae)
    steps, num_particles = check_count("steps", steps), check_count("num_particles", num_particles)
    check_support(vae.model, x)
    with evaluation_mode(vae), pyro.validation_enabled(False):
        start = _start(vae, x, family)
        adam = _Adam(vae, start.family, num_particles)
        t = torch.arange(1, steps + 1, dtype=torch.double)
        rate = learning_rate * (1 + (math.pi * (t - 1) / steps).cos()) / 2  # a falling half cosine
        schedule = torch.stack([rate / (1 - _BETA_1**t), (1 - _BETA_2**t).sqrt()], dim=1).to(start.h)
        # Groups have one size, that of the graph: the last one repeats its last image.
        size = even_block_size(len(x), max(1, pairs_per_pass(vae, x) // num_particles))
        groups = [torch.arange(first, first + size).clamp(max=len(x) - 1) for first in range(0, len(x), size)]
        step: Callable[[list[Tensor]], object] = adam.step
        if compile:
            first = groups[0]
            step = compile_function(lambda *state: adam.step(state), adam.begin(x[first], start.h[first]))
        h = start.h.clone()
        for index in groups:
            state = adam.begin(x[index], start.h[index])
            for scalars in schedule:
                state[-1].copy_(scalars)
                step(state)
            h[index] = state[-4]
        # Keep the better of start and h for each image, by ELBOs from fresh draws of both.
        h = torch.where(h.isfinite().all(1, keepdim=True), h, start.h)
        guides = [replace_guide(vae, Proposal(start.family, features, x)) for features in (start.h, h)]
        before, after = (_estimate_elbo(guided, x, _COMPARISON_PARTICLES) for guided in guides)
        return Proposal(start.family, torch.where((after > before)[:, None], h, start.h), x)


@torch.no_grad()
def _start(vae: LatentModel, x: Data, family: DiagonalNormal | FullNormal | None) -> Proposal:
    """The guide's own features, or the features of ``family`` at the guide's moments."""
    posterior = vae.posterior
    if is_deterministic(posterior(*arguments_of(x[:1]))):
        raise DeterministicGuide("vae: expected a guide with a density, got a deterministic one (Delta)")
    if family is not None:
        found = encode(vae, x)
        return Proposal(family.to(x.device), normal_features(family, found.mean, found.scale), x)
    net, own = getattr(posterior, "net", None), getattr(posterior, "family", None)
    if net is None or own is None:
        raise ValueError(
            "vae: expected a guide Conditional(net, family) as its posterior, whose features are refined, got "
            f"{type(posterior).__name__}; refine_proposal with family=FullNormal(L) needs none"
        )
    return Proposal(own, torch.cat([net(*arguments_of(part)) for part in x.split(images_per_pass(x))]), x)


class _Adam:
    """Adam in the features h (B, F) of a batch of images, as a function of tensors that a graph can hold."""

    def __init__(self, vae: LatentModel, family: Family, num_particles: int) -> None:
        self._vae, self._family, self._num_particles = vae, family, num_particles
        parts: list[Any] = [vae, family]
        self._parts = nn.ModuleList(parts)
        values = detach_tensors(self._parts)
        self._names, self._tensors = list(values), list(values.values())

    def begin(self, x: Data, h: Tensor) -> list[Tensor]:
        """The inputs of ``step``: weights and buffers, x, h, Adam's two moments, and the scalars of a step."""
        arguments = [tensor.contiguous() for tensor in arguments_of(x)]
        return [*self._tensors, *arguments, h.clone(), torch.zeros_like(h), torch.zeros_like(h), h.new_zeros(2)]

    def step(self, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One step, which changes h and its moments in place. Returns the loss, (), nats."""
        *tensors, h, first, second, scalars = state
        tensors, x = tensors[: len(self._names)], tensors[len(self._names) :]
        rate, root_of_correction = scalars.unbind()
        with replace_tensors(self._parts, dict(zip(self._names, tensors, strict=True))):
            slope, loss = torch.func.grad_and_value(self._loss)(h, *x)
        first.copy_(first + (1 - _BETA_1) * (slope - first))
        second.copy_(second + (1 - _BETA_2) * (slope * slope - second))
        h.copy_(h - rate * first / (second.sqrt() / root_of_correction + _EPSILON))
        return (loss.detach(),)

    def _loss(self, h: Tensor, x: Tensor, *further: Tensor) -> Tensor:
        """-(1/k) sum_k log w_k, summed over images, without the score of q in its gradient."""
        z = self._family(h).rsample(torch.Size([self._num_particles]))
        log_q = self._family(h.detach()).log_prob(z)  # of a second object, whose log-density z has not been cached in
        log_p = self._vae.prior(*further).log_prob(z) + self._vae.likelihood(z, *further).log_prob(x)
        return -(log_p - log_q).mean(0).sum()


def _estimate_elbo(vae: LatentModel, x: Data, num_particles: int) -> Tensor:
    """(N,) nats, from fresh draws."""
    return importance(vae.model, vae.guide, x, num_particles=num_particles).elbo


# --- The gaps between log p(x) and the ELBO ---


@dataclass(frozen=True)
class Gaps:
    """Each image's nats; every field and property is (N,), float64.

    ``elbo`` is the guide's, and ``refined_elbo`` that of the best q of the guide's family that was found. A loose bound
    for log p(x) makes the approximation gap too small; a refinement that stopped early makes it too large.
    """

    log_evidence: Tensor
    elbo: Tensor
    refined_elbo: Tensor

    @property
    def approximation(self) -> Tensor:
        """log p(x) - ELBO[q*]."""
        return self.log_evidence - self.refined_elbo

    @property
    def amortization(self) -> Tensor:
        """ELBO[q*] - ELBO[q]: not below 0 in expectation; noise can make it negative for an image."""
        return self.refined_elbo - self.elbo

    @property
    def total(self) -> Tensor:
        """log p(x) - ELBO[q] = KL(q(z | x) || p(z | x))."""
        return self.log_evidence - self.elbo


@serialize_threads()
def measure_gaps(
    vae: LatentModel,
    x: Data,
    log_evidence: Tensor,
    *,
    steps: int = 300,
    num_particles: int = 8,
    evaluation_particles: int = 1000,
    family: DiagonalNormal | FullNormal | None = None,
    compile: bool = False,
) -> Gaps:
    """Split log p(x) - ELBO of each image into two gaps, by refining its q within the guide's family.

        log p(x) - ELBO[q*]        approximation: KL(q*(z) || p(z | x)), q* the best of the guide's family for this x
        ELBO[q*] - ELBO[q(z | x)]  amortization: the cost of one encoder for all images

    A richer family reduces the first, a larger or longer trained encoder the second. Neither contains what the model
    itself lacks, which lowers log p(x). What other layers of a flow guide would gain for an image counts as
    approximation gap. Both ELBOs are means over fresh particles. Draws come from torch's global generator.

    Args:
        vae: A VAE with a guide ``Conditional(net, family)``, so with one layer of latents, or any where ``family`` is
            given.
        x: Images (N, *E), or ``Records``.
        log_evidence: (N,) nats, from annealed importance sampling or a tight bound; another shape raises ValueError.
        steps, num_particles, family, compile: As in ``refine_proposal``, whose errors are these too.
        evaluation_particles: The particles of each of the two ELBOs.

    Reference: Cremer et al. 2018, arXiv 1801.03558, equations 4 to 6.
    """
    if tuple(log_evidence.shape) != (len(x),):
        raise ValueError(f"log_evidence: expected shape ({len(x)},), got {tuple(log_evidence.shape)}")
    q = refine_proposal(vae, x, steps=steps, num_particles=num_particles, family=family, compile=compile)
    with evaluation_mode(vae), pyro.validation_enabled(False):
        elbos = [_estimate_elbo(guided, x, evaluation_particles) for guided in (vae, replace_guide(vae, q))]
    return Gaps(log_evidence.to(elbos[0]), *elbos)
