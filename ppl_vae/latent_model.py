"""Any program as a ``LatentModel``: all continuous latents of an image as one vector, and discrete ones summed.

    mine = vectorize_latents(program, x)   # ais, proposals, gaps, calibration and diagnostics take it
    q = refine_proposal(mine, x, family=FullNormal(4))

The vector z is in R^L. A site with another support, such as a scale above 0, enters by the bijection from R that
``torch.distributions.biject_to`` has for the support, and its density by the Jacobian. A site y that is marked
infer={"enumerate": "parallel"} is no part of z:

    p(z) = sum_y p(y) p(z | y),    p(x | z) = p(x, z) / p(z),    q(z | x) = sum_y q(y | x) q(z | x, y)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import infer_discrete
from pyro.poutine import runtime
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae.enumeration import FIRST_DIM, Dims, enumerate_sites, enumerated_dims, is_enumerated, sum_out
from ppl_vae.latent_sites import describe_site
from ppl_vae.protocols import LatentModel, Program, is_latent_model
from ppl_vae.runtime.batching import floats_per_pixel
from ppl_vae.runtime.capture import is_capturing
from ppl_vae.runtime.records import Data, Records, arguments_of, images_of
from ppl_vae.support import CHECKED_AT_ONCE, probe_image_sites, trial_run
from ppl_vae.vae import VAE
from ppl_vae.weights import (
    log_weight_terms,
    observed_sites,
    particle_plate,
    sampled_sites,
    site_log_prob,
    trace_programs,
)

Lead = tuple[int, ...]  # the dimensions of latent vectors before the last


def vectorize_latents(program: Program, data: Data) -> LatentModel:
    """A program with the parts ``prior``, ``likelihood`` and ``posterior`` over one vector of its continuous latents.

    A program that is made of these parts alone, such as a ``VAE``, is returned itself.

    Args:
        program: A module with a model and a guide, such as a ``PyroProgram``.
        data: Images (N, *E) as the program sees them, or ``Records``: a few rows, whose shapes are taken.

    Raises:
        ValueError: ``importance`` would not take the program, the support of a site depends on a parameter or is not
            that of the guide's site, or a latent depends on the images.
        DeterministicGuide: A ValueError: the guide has no density.
    """
    if not isinstance(program, nn.Module):
        raise ValueError(
            f"program: expected a torch.nn.Module with methods model(x) and guide(x), got {type(program).__name__}; "
            "PyroProgram(model, guide, x) is one"
        )
    if is_latent_model(program) and _is_made_of_its_parts(program, data):
        return program
    return cast(LatentModel, ProgramLatents(cast(Program, program), data))


def _is_made_of_its_parts(program: LatentModel, data: Data) -> bool:
    """Whether log w is that of the attributes prior, likelihood and posterior, which may have another meaning."""
    with trial_run(data.device, program.model, program.guide):
        expected = log_weight_terms(program.model, program.guide, data[:2], 1)
    try:
        vae = VAE(program.prior, program.likelihood, program.posterior)
        with trial_run(data.device, program.model, program.guide):
            found = log_weight_terms(vae.model, vae.guide, data[:2], 1)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return all(_are_close(*pair) for pair in zip(found, expected, strict=True))


class ProgramLatents(nn.Module):
    """The ``LatentModel`` of a program; see ``vectorize_latents``, which makes it.

    Its parts take what the program takes beside the images: ``prior(*further)``, ``likelihood(z, *further)`` and
    ``posterior(x, *further)``. Each runs the program.
    """

    def __init__(self, program: Program, data: Data) -> None:
        super().__init__()
        self.program = program
        runs = _Runs(program, data)
        self.prior, self.likelihood, self.posterior = _Prior(runs), ProgramLikelihood(runs), _Posterior(runs)

    def model(self, *arguments: Tensor) -> object:
        """The program's own model."""
        return self.program.model(*arguments)

    def guide(self, *arguments: Tensor) -> object:
        """The program's own guide."""
        return self.program.guide(*arguments)


class _Runs(nn.Module):
    """Runs of a program on P particles of B images, given z or not, and what they say about z. Shared by the parts."""

    z: Tensor

    def __init__(self, program: Program, data: Data) -> None:
        super().__init__()
        self.program = program
        with trial_run(data.device, program.model, program.guide):
            log_weight_terms(program.model, program.guide, data[:2], 1)  # raises what importance would
            p, q = trace_programs(program.model, program.guide, data[:1], 1)
        names = sampled_sites(q)
        if not names:
            raise ValueError("guide: expected a continuous latent site, got none; importance needs none")
        self.sites = [describe_site(name, p.nodes[name], q.nodes[name]) for name in names]
        self.sizes = [site.real_shape.numel() for site in self.sites]
        self.observed = observed_sites(p)
        self.num_branches = math.prod(enumerated_dims(p).values())
        first = torch.zeros(2, dtype=torch.long, device=data.device)
        self.images = next(iter(probe_image_sites(program.model, data, first)), None)
        self.num_arguments = len(arguments_of(data))
        for i, tensor in enumerate(arguments_of(data[:1])):  # buffers, so that a compiled graph knows them
            self.register_buffer(f"example_{i}", tensor.detach().clone(), persistent=False)
        with trial_run(data.device, program.model):
            z = _LatentDistribution(self, "model", (), x=None, further=()).sample()
        self.register_buffer("z", z, persistent=False)  # at which priors are compared
        if not self.has_equal_priors(x=images_of(data[:CHECKED_AT_ONCE])):
            raise ValueError(
                "model: expected latents that do not depend on the images, got some whose distribution changes with x; "
                "importance and log_evidence take the program as it is"
            )

    def run(
        self,
        part: str,
        lead: Lead,
        *,
        x: Tensor | None = None,
        further: Sequence[Tensor] = (),
        given: Mapping[str, Tensor] | None = None,
        enumerate: bool = False,
    ) -> poutine.Trace:
        """The trace of "model" or "guide" on (P, B) draws, lead = (..., B) and P the product of the rest."""
        P, B = _two_dims(lead)
        program = getattr(self.program, part)
        if given is not None:
            program = poutine.condition(program, data=dict(given))
        with _without_handlers():  # which a plate meets when it is made
            program = particle_plate(P)(program)
            if enumerate:
                program = enumerate_sites(program)
            return poutine.trace(program).get_trace(*self.arguments(B, x, further))

    def example(self) -> list[Tensor]:
        """One image and its further tensors, of one row each."""
        return [self.get_buffer(f"example_{i}") for i in range(self.num_arguments)]

    def arguments(self, B: int, x: Tensor | None, further: Sequence[Tensor]) -> list[Tensor]:
        """B rows of x and of the further tensors, by default those of the example; one row is repeated."""
        first, *others = self.example()
        arguments = [first if x is None else x, *(further or others)]
        return [one.expand(B, *one.shape[1:]) for one in arguments]

    def has_equal_priors(self, *, x: Tensor | None = None, further: Sequence[Tensor] = ()) -> bool:
        """Whether one z has the same log p(z) under every row of images x, or of further tensors."""
        found = []
        with trial_run(self.z.device, self.program.model):
            for part in (Records(*further) if x is None else Records(x)).split(CHECKED_AT_ONCE):
                rows = {"x": None, "further": arguments_of(part)} if x is None else {"x": part.x, "further": ()}
                found.append(_LatentDistribution(self, "model", (len(part),), **rows).log_prob(self.z))
        log_p = torch.cat(found)
        return _are_close(log_p, log_p[:1])

    def check_further(self, further: Sequence[Tensor]) -> None:
        """Raise ValueError unless there is one for each that the program takes."""
        if len(further) != self.num_arguments - 1:
            raise ValueError(
                f"further: expected {self.num_arguments - 1} tensors, which the program takes beside x, got "
                f"{len(further)}; images have them in Records"
            )

    def join(self, trace: poutine.Trace, lead: Lead) -> Tensor:
        """z (*lead, L) of a trace."""
        P, B = _two_dims(lead)
        parts = []
        for site in self.sites:
            value = trace.nodes[site.name]["value"]
            parts.append(site.reals(value.expand(P, B, *site.value_shape)))
        return torch.cat(parts, dim=-1).reshape(*lead, -1)

    def split(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The values of the sites for z (..., B, L), by name, and log |det d values / dz|, (P, B)."""
        P, B = _two_dims(tuple(z.shape[:-1]))
        pairs = list(zip(self.sites, z.reshape(P, B, -1).split(self.sizes, dim=-1), strict=True))
        log_jacobian = sum((site.log_jacobian(u) for site, u in pairs), z.new_zeros(P, B))
        return {site.name: site.values(u) for site, u in pairs}, log_jacobian

    def log_densities(self, trace: poutine.Trace, lead: Lead, names: Sequence[str]) -> list[Tensor]:
        """The log-densities of these sites, and of those that are enumerated, (*K, P, B) each."""
        dims, shape = enumerated_dims(trace), _two_dims(lead)
        all_names = [*names, *(name for name in trace.stochastic_nodes if is_enumerated(trace.nodes[name]))]
        return [site_log_prob(name, trace.nodes[name], shape, dims) for name in all_names]

    def check_simulation(self) -> None:
        """Raise ValueError unless z ~ p(z) and x ~ p(x | z) draw all that the program observes."""
        if len(self.observed) > 1:
            raise ValueError(
                f"model: expected one observed site, the images, where images are simulated, got {self.observed}; "
                "draws of images alone are no draws from a posterior that another observed site or a factor changes"
            )

    @property
    def names(self) -> list[str]:
        """The names of the continuous latent sites."""
        return [site.name for site in self.sites]


def _are_close(a: Tensor, b: Tensor) -> bool:
    """Whether two log-densities are equal but for rounding, which may differ between batches of other sizes."""
    tolerance = torch.finfo(a.dtype).eps ** 0.75
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@contextmanager
def _without_handlers() -> Iterator[None]:
    """Run a program as if it were not called within another: a density must not see the handlers and plates around."""
    stacks: list[list[Any]] = [runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack]
    kept = [stack[:] for stack in stacks]
    for stack in stacks:
        stack.clear()
    try:
        yield
    finally:
        for stack, entries in zip(stacks, kept, strict=True):
            stack[:] = entries


def _two_dims(lead: Lead) -> tuple[int, int]:
    """(P, B) of the leading dimensions (..., B)."""
    return math.prod(lead[:-1]), lead[-1] if lead else 1


class _LatentDistribution(TorchDistribution):
    """p(z) or q(z | x) of a program, event (L,).

    Args:
        runs: The program's runs.
        part: "model" or "guide".
        batch_shape: (B,) where it depends on images or further tensors, else ().
        x, further: What the program takes.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for
    support = constraints.real_vector

    def __init__(
        self, runs: _Runs, part: str, batch_shape: Sequence[int], *, x: Tensor | None, further: Sequence[Tensor]
    ) -> None:
        self._runs, self._part, self._x, self._further = runs, part, x, further
        super().__init__(Size(batch_shape), Size((sum(runs.sizes),)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> _LatentDistribution:
        return _LatentDistribution(self._runs, self._part, batch_shape, x=self._x, further=self._further)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        lead = (*sample_shape, *self.batch_shape)
        with torch.no_grad():
            return self._runs.join(self._runs.run(self._part, lead, x=self._x, further=self._further), lead)

    def log_prob(self, z: Tensor) -> Tensor:
        """z: (..., L) -> (...), nats."""
        lead = tuple(torch.broadcast_shapes(z.shape[:-1], self.batch_shape))
        given, log_jacobian = self._runs.split(z.expand(*lead, z.shape[-1]))
        trace = self._runs.run(self._part, lead, x=self._x, further=self._further, given=given, enumerate=True)
        terms = self._runs.log_densities(trace, lead, self._runs.names)
        return (sum_out(terms, enumerated_dims(trace)) + log_jacobian).reshape(lead)


class _Prior(nn.Module):
    """*further -> p(z), batch (B,) if it differs between the rows of the further tensors, else ()."""

    def __init__(self, runs: _Runs) -> None:
        super().__init__()
        self.runs = runs
        self.event_shape = (sum(runs.sizes),)

    def forward(self, *further: Tensor) -> _LatentDistribution:
        self.runs.check_further(further)
        # A compiled graph cannot decide by values; one distribution for each row is right there, too.
        if further and (is_capturing() or not self.runs.has_equal_priors(further=further)):
            return _LatentDistribution(self.runs, "model", (len(further[0]),), x=None, further=further)
        return _LatentDistribution(self.runs, "model", (), x=None, further=tuple(one[:1] for one in further))


class _Posterior(nn.Module):
    """x (B, *E), *further -> q(z | x), batch (B,)."""

    def __init__(self, runs: _Runs) -> None:
        super().__init__()
        self.runs = runs
        self.event_shape = (sum(runs.sizes),)

    def forward(self, x: Tensor, *further: Tensor) -> Distribution:
        self.runs.check_further(further)
        return _LatentDistribution(self.runs, "guide", (len(x),), x=x, further=further)


class ProgramLikelihood(nn.Module):
    """z (..., B, L), *further -> p(x | z), batch (..., B)."""

    def __init__(self, runs: _Runs) -> None:
        super().__init__()
        self.runs = runs
        self.floats_per_pixel = floats_per_pixel(None) * runs.num_branches

    def forward(self, z: Tensor, *further: Tensor) -> _Images:
        self.runs.check_further(further)
        return _Images(self.runs, z, further)


class _Images(TorchDistribution):
    """p(x | z) of a program, batch (..., B), event E: all observed sites, the images among them."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for

    def __init__(self, runs: _Runs, z: Tensor, further: Sequence[Tensor]) -> None:
        self._runs, self._further, self._lead = runs, further, tuple(z.shape[:-1])
        self._given = runs.split(z)[0]
        super().__init__(Size(self._lead), runs.example()[0].shape[1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """That of the site that observes the images."""
        return self._image_site().support

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | z) = log sum_y p(x, y, z) - log sum_y p(y, z). x: (B, *E) -> (..., B), nats."""
        x = x.expand(_two_dims(self._lead)[1], *self.event_shape)
        trace = self._run(self._given, x=x, enumerate=True)
        dims = enumerated_dims(trace)
        observed = [site_log_prob(name, trace.nodes[name], _two_dims(self._lead), dims) for name in self._runs.observed]
        if not dims:
            return sum(observed[1:], observed[0]).reshape(self._lead)
        latent = self._runs.log_densities(trace, self._lead, self._runs.names)
        return (sum_out([*observed, *latent], dims) - sum_out(latent, dims)).reshape(self._lead)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """x ~ p(x | z), where y ~ p(y | z). -> (*sample_shape, ..., B, *E)."""
        with torch.no_grad():
            fn = self._run(self._draw_discrete()).nodes[self._image_site().name]["fn"]
            x: Tensor = fn.sample(Size(sample_shape))
        return x.reshape(*sample_shape, *self._lead, *self.event_shape)

    @property
    def mean(self) -> Tensor:
        """E[x | z] = sum_y p(y | z) E[x | z, y], (..., B, *E)."""
        trace = self._run(self._given, enumerate=True)
        dims: Dims = enumerated_dims(trace)
        mean: Tensor = trace.nodes[self._image_site().name]["fn"].mean
        if dims:
            terms = self._runs.log_densities(trace, self._lead, self._runs.names)
            log_weights = sum(terms[1:], terms[0]) - sum_out(terms, dims)  # log p(y | z)
            weights = log_weights.exp().reshape(*log_weights.shape, *[1] * len(self.event_shape))
            mean = (weights * mean).flatten(0, -len(self.event_shape) - 3).sum(0)
        return mean.expand(*_two_dims(self._lead), *self.event_shape).reshape(*self._lead, *self.event_shape)

    def _draw_discrete(self) -> dict[str, Tensor]:
        """The given values, and those of the enumerated sites, drawn from p(y | z)."""
        if self._runs.num_branches == 1:
            return self._given
        P, B = _two_dims(self._lead)
        latent = poutine.block(poutine.condition(self._runs.program.model, self._given), hide=self._runs.observed)
        with _without_handlers():
            program = infer_discrete(particle_plate(P)(latent), first_available_dim=FIRST_DIM)
            trace = poutine.trace(program).get_trace(*self._runs.arguments(B, None, self._further))
        marked = [name for name in trace.stochastic_nodes if trace.nodes[name]["infer"].get("enumerate") == "parallel"]
        return self._given | {name: trace.nodes[name]["value"] for name in marked}

    def _run(self, given: Mapping[str, Tensor], *, x: Tensor | None = None, enumerate: bool = False) -> poutine.Trace:
        return self._runs.run("model", self._lead, x=x, further=self._further, given=given, enumerate=enumerate)

    def _image_site(self) -> Any:
        if self._runs.images is None:
            raise ValueError("model: expected a site that observes the images x themselves, got none to draw them from")
        return self._runs.images
