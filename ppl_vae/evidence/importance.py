"""log p(x) from log-weights, with everything needed to know how far it can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from ppl_vae.runtime.batching import (
    BatchSize,
    evaluation_batch_size,
    even_divisor,
    images_per_group,
    images_per_pass,
    pairs_per_pass,
)
from ppl_vae.runtime.blocks import block_seed, compute_blocks
from ppl_vae.runtime.capture import compiled, replaced
from ppl_vae.runtime.errors import CannotCapture, NotFinite, check_count
from ppl_vae.runtime.global_state import evaluation_mode, seed_generators, seeded, serialize_threads
from ppl_vae.runtime.numerics import LogWeightSummary
from ppl_vae.runtime.ranks import agree
from ppl_vae.support import check_support
from ppl_vae.vae import VAE
from ppl_vae.weights import Program, log_reconstruction, log_weight_terms

# An image is called unreliable where its bound is expected to lie more than this below log p(x). Source: ours.
UNRELIABLE_BIAS = 0.5

_SUMMARIZED_AT_ONCE = 10_000  # log-weights


class Importance(NamedTuple):
    """What S particles say of each image; every field is (N,), float64.

    ``log_evidence`` is L_S, whose expectation is a lower bound on log p(x) that rises with S; ``elbo`` is
    ``reconstruction`` - ``kl``, with reconstruction = E_q[log p(x | z)] and kl = E_q[log q(z | x) - log p(z)], means
    over the same particles, all in nats. ``ess`` is from 1 to S. ``pareto_k`` is NaN below 21 particles.
    ``monte_carlo_stderr`` (nats) is the delta method's estimate of what another draw of the particles would change,
    and ``bias`` (nats, not below 0) the jackknife's of what the bound still lacks; both are NaN for one particle. Both
    assume weights with a variance, k below 0.5. Where k-hat is above, as for most images of a trained VAE, they see
    only part: regions that no particle has visited are in neither. ``rise`` is L_S minus the mean of the ten L_{S/10}
    from tenths of the same particles (NaN below 10): what ten times the particles gained, without that assumption.
    """

    log_evidence: Tensor
    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor
    ess: Tensor
    pareto_k: Tensor
    monte_carlo_stderr: Tensor
    bias: Tensor
    rise: Tensor

    def unreliable(self) -> Tensor:
        """(N,) bool: where the jackknife sees more than 0.5 nats still lacking, or sees nothing (a bias of NaN).

        With k-hat above 0.5 that is a rough sieve: a flagged image may be fine, and a passed one may lack as much.
        """
        return ~(self.bias <= UNRELIABLE_BIAS)

    def jackknife_estimate(self) -> Tensor:
        """(N,) L_S + the jackknife's bias, nats: an estimate of log p(x), and no bound. It may lie above log p(x).

        Reference: Nowozin 2018, ICLR (JVI-1).
        """
        return self.log_evidence + self.bias


Terms = Callable[[Program, Program, Tensor, int], tuple[Tensor, Tensor]]


class CapturedTerms:
    """``log_weight_terms`` of one VAE as a compiled graph, for batches of one size; others run as they are.

    Args:
        vae: in evaluation mode. Its weights may change later, its structure may not.
        x: a batch (B, *E) like those to come.
        num_particles: S of a batch.

    Raises:
        CannotCapture: see ``capture.compiled``.
    """

    def __init__(self, vae: VAE, x: Tensor, num_particles: int) -> None:
        self._shape = (tuple(x.shape), num_particles)
        values = dict(vae.named_parameters()) | dict(vae.named_buffers())
        names = list(values)
        self._tensors = [value.detach() for value in values.values()]  # the same memory: changes in place are seen

        def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            with replaced(vae, dict(zip(names, tensors[:-1], strict=True))):
                return log_weight_terms(vae.model, vae.guide, tensors[-1], num_particles)

        self._run = compiled(function, [*self._tensors, x.contiguous()])

    def __call__(self, model: Program, guide: Program, x: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
        if (tuple(x.shape), num_particles) != self._shape:
            return log_weight_terms(model, guide, x, num_particles)
        log_p_x_given_z, log_p_z_over_q_z = self._run([*self._tensors, x.contiguous()])
        return log_p_x_given_z, log_p_z_over_q_z


@serialize_threads()
@torch.no_grad()
def importance(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    num_particles: int,
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
    terms: Terms = log_weight_terms,
) -> Importance:
    """L_S = log (1/S) sum_s p(x, z_s) / q(z_s | x), z_s ~ q(z | x), for each image, with its errors.

    Log-weights are streamed, so memory depends on neither S nor N (but for the results). Draws come from torch's global
    generator, fresh at every call. Weights and modes are left as they are, and no gradients are kept; networks with
    dropout or batch norm should be in evaluation mode. Images are compared with the support of p(x | z); other values
    are validated where Pyro's validation is on.

    Args:
        model: a Pyro program over x with one data plate at dim=-1.
        guide: a Pyro program over x that samples every latent site of the model.
        x: images (N, *E).
        num_particles: S.
        chunk: the most particles an image that are held at once; by default what suits the size of an image, and, where
            the model is a VAE's, what its likelihood holds of a pixel and its prior of a z.
        progress: called with the number of images after each group of them.
        terms: what gives the two parts of the log-weights; see ``CapturedTerms`` for another.

    Returns:
        ``Importance``, each field (N,).

    Raises:
        ValueError: an image off the support, as ``log_weights``, or an argument out of its range.
            ``weights.Deterministic`` is one: a guide without a density.
        NotFinite: a log-weight is NaN.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    num_particles = check_count("num_particles", num_particles)
    chunk = chunk if chunk is None else check_count("chunk", chunk)
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    check_support(model, x)
    pairs = pairs_per_pass(getattr(model, "__self__", None), x)
    chunk = min(num_particles, chunk or pairs)
    # Results have their place before the work: small tensors kept between large ones would fragment memory for good.
    results = torch.empty(len(Importance._fields), len(x), dtype=torch.double, device=x.device)
    group = max(1, pairs // chunk)
    for images, place in zip(x.split(group), results.split(group, dim=1), strict=True):
        torch.stack(_importance_of_group(model, guide, images, num_particles, chunk, terms), out=place)
        if progress is not None:
            progress(len(images))
    return Importance(*results)


def _together(starts: range, numbers: int) -> Iterator[range]:
    """Passes whose log-weights are summarized at once, since that costs nearly the same for one as for several."""
    passes = max(1, _SUMMARIZED_AT_ONCE // numbers)
    return (starts[i : i + passes] for i in range(0, len(starts), passes))


def summarize_log_weights(
    model: Program, guide: Program, x: Tensor, num_particles: int, *, chunk: int, terms: Terms = log_weight_terms
) -> tuple[LogWeightSummary, Tensor, Tensor]:
    """Summary of S log-weights of each image, and the means of log p(x | z) and of log q(z | x) - log p(z) (B,).

    Arguments as ``importance``; all images are held at once. Nothing is checked.

    Raises:
        NotFinite: a log-weight is NaN or +infinity.
    """
    summary = LogWeightSummary(num_particles, len(x), device=x.device)
    reconstruction = torch.zeros(len(x), dtype=torch.double, device=x.device)
    kl = torch.zeros_like(reconstruction)
    for starts in _together(range(0, num_particles, chunk), len(x) * chunk):
        parts = [terms(model, guide, x, min(chunk, num_particles - start)) for start in starts]
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


def _importance_of_group(
    model: Program, guide: Program, x: Tensor, num_particles: int, chunk: int, terms: Terms
) -> Importance:
    summary, reconstruction, kl = summarize_log_weights(model, guide, x, num_particles, chunk=chunk, terms=terms)
    return Importance(
        log_evidence=summary.log_mean_exp(),
        elbo=reconstruction - kl,
        reconstruction=reconstruction,
        kl=kl,
        ess=summary.effective_sample_size(),
        pareto_k=summary.pareto_k(),
        monte_carlo_stderr=summary.monte_carlo_stderr(),
        bias=summary.bias(),
        rise=summary.rise(),
    )


def log_evidence(model: Program, guide: Program, x: Tensor, *, num_particles: int, chunk: int | None = None) -> Tensor:
    """The bound L_S for each image: (N,) nats.

    Args: as ``importance``, whose errors are these too.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    return importance(model, guide, x, num_particles=num_particles, chunk=chunk).log_evidence


@serialize_threads()
def evaluate(
    vae: VAE,
    x: Tensor,
    *,
    num_particles: int,
    seed: int,
    check: bool = False,
    compile: bool = False,
    on_compiled: Callable[[float], None] | None = None,
    progress: Callable[[int], None] | None = None,
    done: Mapping[int, Tensor] | None = None,
    on_block: Callable[[int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> Importance:
    """``importance`` of a VAE in evaluation mode, with draws of their own seed; values are validated if ``check``.

    Images go in groups of ``images_per_group``. The noise of a group is seeded by (seed, place of its first image), so
    that an image's numbers depend neither on how many ranks share the work (``distributed``; every rank calls this, and
    each has all results) nor on whether it went on from an interruption.

    With ``compile`` the log-weights of a pass are one compiled graph; ``on_compiled`` is told the seconds that this
    took. It computes the same to rounding. A graph validates nothing: ``check`` then sees the first image alone.

    Where memory runs out, half as many particles go through at once, and so on (``batching.BatchSize``). From there on
    the bound is another draw of the same bound: a generator gives the numbers of two small passes in another order than
    those of a large one.

    The VAE's weights, buffers and mode and the global generators are afterwards as they were before.

    Args:
        vae: on the device of the images.
        x: images (N, *E), the same on every rank.
        num_particles: S.
        seed: of the draws.
        progress: called with the number of images after each group of them.
        done: results of groups from before, as ``on_block`` was given them.
        on_block: called with the place of a group's first image, and ``Importance``'s fields as the columns of (n, 9).
        should_stop: asked after each group of images.
        say: is told where memory runs out.

    Raises:
        CannotCapture: a ValueError: ``compile`` is asked for and impossible; says why.
        Deterministic: a ValueError: the guide has no density; ``reconstruction`` needs none.
        ValueError: an image off the support, or an argument out of its range.
        NotFinite: a log-weight is NaN.
        Stopped: ``should_stop`` said so; see ``blocks.compute_blocks``.
        ConnectionError: another rank met an error.
    """
    num_particles = check_count("num_particles", num_particles)
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    check_support(vae.model, x)
    with seeded(seed, x.device), pyro.validation_enabled(check), evaluation_mode(vae), torch.no_grad():
        size = images_per_group(x, num_particles)
        # With and without compiling, so that the noise is the same.
        batch = BatchSize(*evaluation_batch_size(vae, x, num_particles), device=x.device, say=say)
        terms: Terms = log_weight_terms
        if compile:
            terms = _captured(vae, x, batch, seed=seed, on_compiled=on_compiled)

        def compute(group: slice) -> Tensor:
            def attempt(particles: int, images: int) -> Tensor:
                seed_generators(block_seed(seed, group.start), x.device)
                parts = x[group].split(images)
                found = [_importance_of_group(vae.model, vae.guide, p, num_particles, particles, terms) for p in parts]
                return torch.cat([torch.stack(part, dim=1) for part in found])

            return batch.run(attempt)

        table = compute_blocks(
            compute,
            len(x),
            size,
            num_columns=len(Importance._fields),
            device=x.device,
            progress=progress,
            done=done,
            on_block=on_block,
            should_stop=should_stop,
        )
    return Importance(*table.T.contiguous())


def _captured(
    vae: VAE, x: Tensor, batch: BatchSize, *, seed: int, on_compiled: Callable[[float], None] | None
) -> CapturedTerms:
    """The log-weights of a whole pass as a compiled graph, on every rank or on none."""
    started, error = time.monotonic(), None
    with seeded(seed, x.device):
        log_weight_terms(vae.model, vae.guide, x[:1], 1)  # what is wrong is said as it is without compiling
        try:
            terms = CapturedTerms(vae, x[: batch.images], batch.particles)
        except CannotCapture as caught:
            error = str(caught)
    if agree(error is not None):
        raise CannotCapture(error or "another rank cannot compile it")
    if on_compiled is not None:
        on_compiled(time.monotonic() - started)
    return terms


@serialize_threads()
@torch.no_grad()
def reconstruction(
    vae: VAE,
    x: Tensor,
    *,
    seed: int,
    check: bool = False,
    progress: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> Tensor:
    """log p(x | z), one z ~ q(z | x) an image: what an autoencoder, whose z is a function of x, is measured by.

    It is no log-likelihood and no bound on one: neither how probable z is, nor how many values of z would do, is in
    it. More latents raise it without end. Groups, ranks, seeds and memory are as in ``evaluate``. The VAE's weights,
    buffers and mode and the global generators are afterwards as they were before.

    Args:
        vae: with or without a density q(z | x).
        x: images (N, *E), the same on every rank.
        seed: of z, where it is drawn, and of whatever else the programs draw.
        check: whether values are validated.
        progress: called with the number of images after each group of them.
        should_stop: asked after each group of images.
        say: is told where memory runs out.

    Returns:
        (N,) nats, float64.

    Raises:
        ValueError: no images, one off the support, or as ``log_weights``.
        NotFinite: a value is NaN or +infinity.
        Stopped: ``should_stop`` said so.
        ConnectionError: another rank met an error.
    """
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    check_support(vae.model, x)
    size = images_per_group(x, 1)
    most = images_per_pass(x, vae.likelihood)
    batch = BatchSize(1, even_divisor(size, most), device=x.device, say=say)

    def compute(group: slice) -> Tensor:
        def attempt(_: int, images: int) -> Tensor:
            seed_generators(block_seed(seed, group.start), x.device)
            parts = [log_reconstruction(vae.model, vae.guide, part) for part in x[group].split(images)]
            return torch.cat(parts).double()[:, None]

        rows = batch.run(attempt)
        if rows.isnan().any() or rows.isposinf().any():
            raise NotFinite("log p(x | z): expected numbers, got NaN or +infinity")
        return rows

    with seeded(seed, x.device), pyro.validation_enabled(check), evaluation_mode(vae):
        table = compute_blocks(
            compute, len(x), size, num_columns=1, device=x.device, progress=progress, should_stop=should_stop
        )
    return table[:, 0]
