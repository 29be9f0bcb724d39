"""Check that images lie on the support of p(x | z), before any function scores them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.errors import first_line
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.runtime.records import Data, arguments_of, images_of

CHECKED_AT_ONCE = 1000  # images


class ImageSite(NamedTuple):
    """An observed site whose value is the images.

    Args:
        name: The site's name.
        support: The support of its distribution, which is the same for all images.
        replaces_missing: Whether the program replaces a NaN by a value of its own.
    """

    name: str
    support: constraints.Constraint
    replaces_missing: bool


def find_image_sites(trace: poutine.Trace, x: Tensor) -> list[ImageSite]:
    """Find the sites of the model's trace on x (B, *E), B at least 2, that observe x itself, pixel by pixel.

    A site whose support depends on the parameters of an image's distribution is left out: it holds for that image only.
    """
    found = []
    for name in trace.observation_nodes:
        value, fn = trace.nodes[name]["value"], trace.nodes[name]["fn"]
        if not isinstance(value, Tensor) or value.shape != x.shape or not ((value == x) | x.isnan()).all():
            continue
        try:
            support = fn.support
        except NotImplementedError:
            continue
        if support.check(x[:1]).shape == (1,):  # one answer per image
            found.append(ImageSite(name, support, bool(x.isnan().any() and not value.isnan().any())))
    return found


def check_site(site: ImageSite, x: Tensor) -> None:
    """Raise ValueError if an image of x (B, *E) is off the site's support; a NaN is, unless it is replaced."""
    if site.support.check(x).all():
        return
    values = x.reshape(len(x), -1)
    given = ~values.isnan()
    if site.replaces_missing:
        first = values.gather(1, given.int().argmax(1, keepdim=True))  # a value of the same image that is not NaN
        values = torch.where(given, values, first)
    good = site.support.check(values.reshape(x.shape)).reshape(len(x), -1).all(1)
    if site.replaces_missing:
        good = good | ~given.any(1)
    if not good.all():
        bad = x[~good]
        support = getattr(site.support, "base_constraint", site.support)
        some = bad[~bad.isnan()]
        got = f"values from {some.min():.4g} to {some.max():.4g}" if len(some) == bad.numel() else "values that are NaN"
        raise ValueError(
            f"site {site.name!r}: expected images within the support {support} of p(x | z), got at least {len(bad)} "
            f"outside it, with {got}"
        )


def find_missing(x: Tensor) -> int | None:
    """The place of the first image of x (N, *E) with a NaN; None without any."""
    if not x.is_floating_point():
        return None
    has_nan = torch.cat([part.reshape(len(part), -1).isnan().any(1) for part in x.split(CHECKED_AT_ONCE)])
    return int(has_nan.int().argmax()) if has_nan.any() else None


@torch.no_grad()
def check_support(model: StochasticFunction, data: Data) -> None:
    """Refuse images to which p(x | z) gives no probability; their computed "log-likelihood" would be meaningless.

    The model runs once, on two images, in evaluation mode and with a seed of its own, to find the sites that observe
    the images. Then every image is compared with the support of these sites. A site that observes something else, such
    as images that the program rescales, is not checked.

    NaN is off every support, unless the program replaces it as ``missing.Observed`` does.

    Args:
        model: A Pyro program over x with one data plate at dim=-1.
        data: Images x (N, *E), or ``Records``.

    Raises:
        ValueError: x is no tensor (N, *E) or empty, or an image is off the support or of another shape.
    """
    x = images_of(data)
    if not isinstance(x, Tensor):
        raise ValueError(
            f"x: expected a tensor of images, (N, *E), got {describe_type(x)}; torch.as_tensor(x, dtype=torch.float32) "
            "makes one of a NumPy array"
        )
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    parts = x.split(CHECKED_AT_ONCE)
    # Only an image with a NaN shows whether the program replaces it.
    sites = probe_image_sites(model, data, torch.full((2,), find_missing(x) or 0, device=x.device))
    for site in sites:
        for part in parts:
            check_site(site, part)


@contextmanager
def explain_program() -> Iterator[None]:
    """Turn errors that Python and Pyro raise about a program into a ValueError of one line that says what to do."""
    try:
        yield
    except TypeError as error:
        if "required positional argument" in str(error):
            raise ValueError(f"{first_line(error)}; pass Records(x, y) where the program takes more than x") from None
        if "positional argument" in str(error) and "given" in str(error):
            raise ValueError(
                f"{first_line(error)}; Records(x, y) give a program y after x, and each part of a VAE y as its last "
                "argument"
            ) from None
        if "object is not callable" in str(error):
            raise ValueError(
                f"{first_line(error)}; a site takes distributions of pyro.distributions, not those of torch"
            ) from None
        raise
    except ValueError as error:
        words = str(error)
        if "subsample_size" in words:
            raise ValueError(
                'plate: expected one of all images of a batch, pyro.plate("images", len(x), dim=-1), got one that '
                "subsamples; leave batches to fit (Schedule.batch_size)"
            ) from None
        if "collide at dim" in words:
            raise ValueError(
                "plate: expected the images' plate at dim=-1 alone, got another at dim=-2; make its dimension part of "
                "the distributions' events (to_event)"
            ) from None
        raise


def find_module(program: StochasticFunction) -> nn.Module | None:
    """The module that a program, within effect handlers, is, or whose method it is; None if there is none."""
    bare = unwrap(program)
    module = bare if isinstance(bare, nn.Module) else getattr(bare, "__self__", None)
    return module if isinstance(module, nn.Module) else None


@contextmanager
def trial_run(device: torch.device, *programs: StochasticFunction) -> Iterator[None]:
    """Run these programs in evaluation mode, without gradients and validation; random generators are restored."""
    with ExitStack() as stack:
        for block in (seeded(0, device), torch.no_grad(), pyro.validation_enabled(False)):
            stack.enter_context(block)
        for module in filter(None, map(find_module, programs)):
            stack.enter_context(evaluation_mode(module))
        yield


def describe_type(x: object) -> str:
    """The type of an argument in words, with dtype and shape where it has them.

    >>> describe_type(torch.zeros(2, 3))
    'Tensor of dtype torch.float32 and shape (2, 3)'
    """
    name, dtype = type(x).__name__, getattr(x, "dtype", None)
    return name if dtype is None else f"{name} of dtype {dtype} and shape {tuple(getattr(x, 'shape', ()))}"


def probe_image_sites(model: StochasticFunction, x: Data, places: Tensor) -> list[ImageSite]:
    """Run the model on the images of x (N, *E) at these places, two or more, and find the sites that observe them.

    Raises:
        ValueError: The model refuses the images.
    """
    probe = x[places]
    with trial_run(x.device, model), poutine.block(), explain_program():
        try:
            trace = poutine.trace(model).get_trace(*arguments_of(probe))
        except ValueError as error:  # such as images of another shape; Pyro adds lines of its own
            words = str(error).splitlines()[0].replace(str(tuple(probe.shape)), str(tuple(x.shape)))
            raise ValueError(words) from error
    return find_image_sites(trace, images_of(probe))
