"""Discrete latent sites that are summed exactly: those marked infer={"enumerate": "parallel"}, as in Pyro.

Such a site has all its values at once, along a dimension of its own to the left of particles and images. What depends
on it has that dimension too, and a sum over the dimension takes the site out of the density,

    log p(x, z) = log sum_y p(y) p(z | y) p(x | z, y).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from ppl_vae.protocols import StochasticFunction

Dims = Mapping[int, int]  # the dimension of each enumerated site, counted from the right, and its number of values

FIRST_DIM = -3  # left of particles and images


def enumerate_sites(program: StochasticFunction, *, after: bool = False) -> StochasticFunction:
    """The program with all values of its marked sites at once.

    A guide runs first. The model runs ``after`` it, and its sites get dimensions to the left of the guide's.
    """
    return EnumMessenger(None if after else FIRST_DIM)(program)


def is_enumerated(site: dict[str, Any]) -> bool:
    """Whether a site of a trace has all its values at once."""
    return "_enumerate_dim" in site["infer"]


def enumerated_dims(trace: poutine.Trace) -> Dims:
    """The dimensions of a trace's enumerated sites, the last site's first."""
    sites = [trace.nodes[name] for name in trace.stochastic_nodes]
    found = {site["infer"]["_enumerate_dim"]: site for site in sites if is_enumerated(site)}
    return {dim: found[dim]["fn"].enumerate_support(expand=False).shape[0] for dim in sorted(found)}


def check_enumeration(trace: poutine.Trace) -> None:
    """Refuse, with a ValueError, marked sites whose values cannot be summed here."""
    dims: dict[int, str] = {}
    for name in trace.stochastic_nodes:
        infer = trace.nodes[name]["infer"]
        if infer.get("enumerate") == "sequential" or infer.get("num_samples") is not None:
            raise ValueError(f"site {name!r}: expected infer={{'enumerate': 'parallel'}} alone, got {infer}")
        if not is_enumerated(trace.nodes[name]):
            continue
        other = dims.setdefault(infer["_enumerate_dim"], name)
        if other != name:
            raise ValueError(
                f"site {name!r}: expected an enumerated site with a dimension of its own, got that of {other!r}; "
                "write the loop without pyro.markov"
            )


def sum_out(terms: Sequence[Tensor], dims: Dims) -> Tensor:
    """log sum_{y_1, y_2, ...} exp(sum of terms), over the dimensions ``dims``.

    One site after the other is summed, the last first, over the terms that depend on it: a chain of n sites with K
    values costs n K^2, and not K^n. Sums are logarithms throughout, so that none underflows.

    Args:
        terms: One log-density or more, which broadcast to (*K, S, B), nats.
        dims: As ``enumerated_dims``.

    Returns:
        (S, B) nats, with the dimensions that are not summed on the left.
    """
    remaining = list(terms)
    for dim in sorted(dims):
        within = [term for term in remaining if term.dim() >= -dim and term.shape[dim] > 1]
        outside = [term for term in remaining if term.dim() < -dim or term.shape[dim] == 1]
        remaining = [*outside, _add(within).logsumexp(dim, keepdim=True)] if within else outside
    total = _add(remaining)
    while total.dim() > 2 and total.shape[0] == 1:
        total = total[0]
    return total


def _add(terms: Sequence[Tensor]) -> Tensor:
    first, *others = terms
    return sum(others, first)
