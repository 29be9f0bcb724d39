"""The blocks of a page, as frozen dataclasses.

``Text``, captions and evidence know two marks, ``**bold**`` and ```code``` between backticks. All else is escaped. A
blank line starts a new paragraph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ppl_vae.conditional import Conditional
from ppl_vae.parts import likelihoods, networks

# --- A decoder for the browser ---

HalfArray = npt.NDArray[np.float16]

# Hidden activations that explorer.js knows; the last layer has "none".
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.GLU: "glu"}


class Layer(NamedTuple):
    """a(W x + b), with W (out, in) and b (out,) in half precision.

    The activation is "relu", "silu", "tanh", "glu" (u sigmoid(v) of the two halves) or "none".
    """

    weight: HalfArray
    bias: HalfArray
    activation: str


class Link(NamedTuple):
    """mean = gain f(bound tanh(h / bound)): from a pixel's feature to its mean.

    Args:
        name: f: "identity", "sigmoid", "exp" or "continuous-bernoulli", 1 / (1 - e^-h) - 1 / h.
        bound: Infinite where the feature is taken as it is.
        gain: In the unit of the data.
        white: The mean that is shown as white; 0 is black.
    """

    name: str
    bound: float = math.inf
    gain: float = 1.0
    white: float = 1.0


class DecoderWeights(NamedTuple):
    """E[x | z] = link(W_n a(... a(W_1 z + b_1)) + b_n), one feature a pixel of an image (C, H, W), C = 1 or 3."""

    layers: tuple[Layer, ...]
    event_shape: tuple[int, int, int]
    link: Link

    @property
    def latent_dim(self) -> int:
        """The number of latents L."""
        return self.layers[0].weight.shape[1]


def _link_in_units(family: likelihoods.Normal) -> Link:
    return Link("identity", gain=float(family.unit))


# What the mean of a pixel is, by the likelihood. Levels and counts are white at 255.
_LINKS: dict[type, Callable[[Any], Link]] = {
    likelihoods.Bernoulli: lambda _: Link("sigmoid"),
    likelihoods.ContinuousBernoulli: lambda _: Link("continuous-bernoulli"),
    likelihoods.Beta: lambda _: Link("sigmoid", bound=10.0),
    likelihoods.Binomial: lambda _: Link("sigmoid", gain=255.0, white=255.0),
    likelihoods.Poisson: lambda _: Link("exp", bound=15.0, white=255.0),
    likelihoods.NegativeBinomial: lambda _: Link("exp", bound=15.0, white=255.0),
    likelihoods.Normal: _link_in_units,
    likelihoods.NormalFixed: _link_in_units,
    likelihoods.NormalOptimal: _link_in_units,
    likelihoods.NormalPerPixel: _link_in_units,
    likelihoods.Laplace: _link_in_units,
    likelihoods.StudentT: _link_in_units,
}


def _half(values: Tensor, name: str) -> HalfArray:
    largest = float(np.finfo(np.float16).max)
    if not values.detach().abs().max() <= largest:  # also where it is no number
        raise ValueError(f"{name}: expected weights of at most {largest:.0f} in size (half precision), got larger ones")
    return values.detach().cpu().numpy().astype(np.float16)


def _layer(linear: nn.Linear, activation: str, name: str, *, rows: int | None = None) -> Layer:
    return Layer(_half(linear.weight[:rows], name), _half(linear.bias[:rows], name), activation)


def _hidden_layers(layers: nn.Sequential) -> tuple[Layer, ...]:
    """The layers of the pairs (linear, activation) that both networks consist of."""
    found = []
    modules = list(layers)
    for k, (linear, activation) in enumerate(zip(modules[::2], modules[1::2], strict=True)):
        name = _ACTIVATIONS.get(type(activation))
        if name is None or not isinstance(linear, nn.Linear):
            raise ValueError(
                f"decoder: a page can draw dense layers followed by {', '.join(_ACTIVATIONS.values())}, got "
                f"{type(activation).__name__}"
            )
        found.append(_layer(linear, name, f"decoder layer {k}"))
    return tuple(found)


def decoder_weights(likelihood: Conditional) -> DecoderWeights:
    """The decoder p(x | z) = family(net(z)) in half precision, with the features that its mean needs.

    Args:
        likelihood: A dense network over the latents, with a likelihood whose mean is a function of one feature a pixel.

    Raises:
        ValueError: A decoder that a page cannot draw, with the reason.
    """
    if not isinstance(likelihood, Conditional):
        raise ValueError(f"decoder: expected a network that ends in a likelihood, got {type(likelihood).__name__}")
    net, family, event_shape = likelihood.net, likelihood.family, likelihood.event_shape
    if not isinstance(net, networks.MLP | networks.GatedMLP):
        raise ValueError(f"decoder: a page can draw dense networks (mlp, gated), got {type(net).__name__}")
    link = _LINKS.get(type(family))
    if link is None:
        raise ValueError(
            f"decoder: a page can draw likelihoods whose mean is a function of one feature a pixel, got "
            f"{type(family).__name__}"
        )
    if len(event_shape) != 3 or event_shape[0] not in (1, 3):
        raise ValueError(f"decoder: a page can draw images (1, H, W) or (3, H, W), got event shape {event_shape}")
    output = _layer(net.output, "none", "decoder output", rows=math.prod(event_shape))
    channels, height, width = event_shape
    return DecoderWeights((*_hidden_layers(net.layers), output), (channels, height, width), link(family))


# --- Blocks ---

Cell: TypeAlias = str | float | int | None
NamedPicture: TypeAlias = tuple[str, bytes]


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption, and ``alt``, what it shows, for those who do not see it."""

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class VerdictBlock:
    """A verdict with its evidence, the advice on what would change it, if any, and the figure that shows it."""

    word: str
    evidence: str
    advice: str = ""
    figure: Picture | None = None
    severity: Literal["healthy", "warning"] = "warning"


@dataclass(frozen=True)
class Table:
    """Rows under named columns; columns of numbers are set to the right.

    Args:
        columns: Their headings.
        rows: As many cells as there are columns: text, numbers, or None for nothing.
        caption: Says what to see.
        highlight: The row that stands out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: int | None = None


@dataclass(frozen=True)
class SliderStop:
    """What a slider shows at one position.

    Args:
        label: the value there, such as "0.1".
        rows: named strips of images, the same names at every stop.
        numbers: named values in words, the same names at every stop.
    """

    label: str
    rows: Sequence[NamedPicture]
    numbers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slider:
    """Strips of images and numbers that change together as one quantity is moved.

    Args:
        label: what is moved, such as "beta".
        positions: at least one stop, in order.
        caption: says what to see.
        fixed: a strip that stays, such as the originals.
        start: the stop shown first.
    """

    label: str
    positions: Sequence[SliderStop]
    caption: str
    fixed: NamedPicture
    start: int = 0


@dataclass(frozen=True)
class Explorer:
    """The plane of two latents, and the decoder's mean at the pointer, computed by the page itself.

    Args:
        decoder: Its weights.
        caption: Says what to see.
        points: (N, 2) codes to show in the plane, such as posterior means.
        start: Where it begins, (z_i, z_j).
        extent: The plane shows -extent to extent in both.
        labels: (N,) whole numbers from 0 that color the points.
        label_names: Of the labels, for the legend; their numbers where empty.
        axes: (i, j), which latents are moved.
        base: (L,), where the others stay; 0 where None.
    """

    decoder: DecoderWeights
    caption: str
    points: npt.NDArray[np.floating]
    start: tuple[float, float] = (0.0, 0.0)
    extent: float = 3.0
    labels: npt.NDArray[np.integer] | None = None
    label_names: Sequence[str] = ()
    axes: tuple[int, int] = (0, 1)
    base: npt.NDArray[np.floating] | None = None


Block: TypeAlias = Text | VerdictBlock | Table | Picture | Slider | Explorer


@dataclass(frozen=True)
class Section:
    """A heading, the blocks below it, and the anchor that links to it, "#anchor"."""

    title: str
    blocks: Sequence[Block]
    anchor: str
