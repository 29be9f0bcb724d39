"""Continuous latent sites of a program as real numbers: each value is the image of real numbers under a bijection."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints


class LatentSite(NamedTuple):
    """A continuous latent site, whose values are images of real numbers u.

    Args:
        name: The site's name.
        to_value: From u to the value.
        real_shape, value_shape: The event shapes of u and of the value.
    """

    name: str
    to_value: Transform
    real_shape: Size
    value_shape: Size

    def values(self, u: Tensor) -> Tensor:
        """(P, B, numel) real numbers -> (P, B, *value_shape)."""
        value: Tensor = self.to_value(u.reshape(*u.shape[:2], *self.real_shape))
        return value

    def reals(self, value: Tensor) -> Tensor:
        """The inverse of ``values``."""
        u: Tensor = self.to_value.inv(value)
        return u.reshape(*u.shape[:2], -1)

    def log_jacobian(self, u: Tensor) -> Tensor:
        """(P, B) log |det d value / du|."""
        u = u.reshape(*u.shape[:2], *self.real_shape)
        found = self.to_value.log_abs_det_jacobian(u, self.to_value(u))
        return found.reshape(*u.shape[:2], -1).sum(-1)


def describe_site(name: str, p: dict[str, Any], q: dict[str, Any]) -> LatentSite:
    """The site of that name, from its nodes in the traces of model and guide.

    Raises:
        ValueError: Its values are not images of real numbers, in the same way for all images.
    """
    support, base = p["fn"].support, _base_support(p["fn"].support)
    if base.is_discrete:
        raise ValueError(
            f"site {name!r}: expected a continuous latent, or one marked infer={{'enumerate': 'parallel'}}"
        )
    if any(isinstance(value, Tensor) for value in vars(base).values()):
        raise ValueError(
            f"site {name!r}: expected a support without parameters, such as the real numbers or those above 0, got "
            f"{base}; sample a normal or a Beta and rescale it in the program"
        )
    if _base_support(q["fn"].support) is constraints.real and base is not constraints.real:
        raise ValueError(
            f"site {name!r}: expected a guide within the model's support {base}, got one on all real numbers; use a "
            "distribution on that support, such as a LogNormal for values above 0"
        )
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    try:
        to_value, shape = biject_to(support), p["fn"].event_shape
    except NotImplementedError:
        raise ValueError(
            f"site {name!r}: expected a support that torch.distributions.biject_to maps real numbers to, got "
            f"{support}; sample real numbers and transform them in the program"
        ) from None
    return LatentSite(name, to_value, to_value.inverse_shape(shape), shape)


def _base_support(support: constraints.Constraint) -> constraints.Constraint:
    """The support of one number or row: without what says how many there are, or that they are of a mixture."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
