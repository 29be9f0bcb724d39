"""The live decoder of a page: a plane of two principal directions of the codes, through the code of an image."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae import data
from ppl_vae.conditional import Conditional
from ppl_vae.diagnostics.latents import active_units
from ppl_vae.diagnostics.pictures import find_principal_directions
from ppl_vae.evidence.moments import compute_moments, encode, sample_latents
from ppl_vae.parts import likelihoods, networks
from ppl_vae.reports.page import blocks as page
from ppl_vae.reports.text import pages as text
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run
from ppl_vae.runtime.global_state import seeded

HalfArray = npt.NDArray[np.float16]

_SEED = 0
_MOST_WEIGHTS = 8_000_000  # of a decoder: 21 MB of the page
_MOST_POINTS, _MOST_PIXELS = 1000, 784_000  # of the test images on a page: about 0.2 MB of binary digits
_MOST_DIRECTIONS = 10  # by which the most central image is found
_MOST_CODES = 0.995  # the share of codes, and of draws of the prior, that lie well within the plane
_LEAST_EXTENT = 1e-3

# --- The decoder ---

# Hidden activations that explorer.js knows; the last layer has "none".
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.GLU: "glu"}


# a(W x + b): W (out, in), b (out,), and the activation a; "glu" is u sigmoid(v) of the two halves.
Layer = tuple[HalfArray, HalfArray, str]


# Likelihoods whose mean is the first feature, in the data's unit; that of a Bernoulli is its sigmoid.
_NORMALS = (
    *(likelihoods.Normal, likelihoods.NormalFixed, likelihoods.NormalOptimal, likelihoods.NormalPerPixel),
    *(likelihoods.Laplace, likelihoods.StudentT),
)


class DecoderWeights(NamedTuple):
    """E[x | z] = u f(W_n a(... a(W_1 z + b_1)) + b_n), one feature per pixel of an image (C, H, W), C = 1 or 3.

    f is "sigmoid" or "identity", and u the unit of the data. A mean of 0 is shown black, of 1 white.
    """

    layers: tuple[Layer, ...]
    event_shape: tuple[int, int, int]
    link: str
    unit: float = 1.0

    @property
    def latent_dim(self) -> int:
        """The number of latents L."""
        return self.layers[0][0].shape[1]

    def to_json(self) -> dict[str, object]:
        """For explorer.js: the weights of all layers in one string, each matrix by rows, then its bias."""
        flat = [part.ravel() for weight, bias, _ in self.layers for part in (weight, bias)]
        return {
            "layers": [[*weight.shape, activation] for weight, _, activation in self.layers],
            "shape": list(self.event_shape),
            "link": self.link,
            "scale": self.unit,
            "weights": page.encode_base64(np.concatenate(flat).astype("<f2")),
        }


def decoder_weights(likelihood: Callable[[Tensor], Distribution]) -> DecoderWeights:
    """The decoder p(x | z) = family(net(z)) in half precision, with the features that its mean needs.

    Args:
        likelihood: A dense network that ends in a Bernoulli, a normal or another likelihood with a location.

    Raises:
        ValueError: A decoder that a page cannot draw, with the reason.
    """
    if not isinstance(likelihood, Conditional):
        raise ValueError(f"decoder: expected a network that ends in a likelihood, got {type(likelihood).__name__}")
    net, family, event_shape = likelihood.net, likelihood.family, likelihood.event_shape
    if not isinstance(net, networks.MLP | networks.GatedMLP):
        raise ValueError(f"decoder: a page can draw dense networks (mlp, gated), got {type(net).__name__}")
    if type(family) not in (likelihoods.Bernoulli, *_NORMALS):
        raise ValueError(
            f"decoder: a page can draw Bernoulli, normal and similar likelihoods, got {type(family).__name__}"
        )
    if len(event_shape) != 3 or event_shape[0] not in (1, 3):
        raise ValueError(f"decoder: a page can draw images (1, H, W) or (3, H, W), got event shape {event_shape}")
    layers, modules = [], list(net.layers)  # pairs of a linear map and an activation, in both networks
    for k, (linear, activation) in enumerate(zip(modules[::2], modules[1::2], strict=True)):
        if isinstance(activation, nn.Sequential):
            activation = activation[0]  # without the dropout of training
        name = _ACTIVATIONS.get(type(activation))
        if name is None or not isinstance(linear, nn.Linear):
            raise ValueError(
                f"decoder: a page can draw dense layers followed by {', '.join(_ACTIVATIONS.values())}, got "
                f"{type(activation).__name__}"
            )
        layers.append(_make_layer(linear, name, f"decoder layer {k}"))
    output = _make_layer(net.output, "none", "decoder output", rows=math.prod(event_shape))
    if (size := sum(weight.size for weight, _, _ in (*layers, output))) > _MOST_WEIGHTS:
        raise ValueError(f"decoder: a page can hold {_MOST_WEIGHTS:,} weights, got {size:,}")
    channels, height, width = event_shape
    link = "sigmoid" if isinstance(family, likelihoods.Bernoulli) else "identity"
    return DecoderWeights((*layers, output), (channels, height, width), link, float(getattr(family, "unit", 1.0)))


def _make_layer(linear: nn.Linear, activation: str, name: str, *, rows: int | None = None) -> Layer:
    """The first rows of a layer in half precision."""

    def halve(values: Tensor) -> HalfArray:
        largest = float(np.finfo(np.float16).max)
        if not values.detach().abs().max() <= largest:  # also where it is no number
            words = f"expected weights of at most {largest:.0f} in size (half precision), got larger ones"
            raise ValueError(f"{name}: {words}")
        return values.detach().cpu().numpy().astype(np.float16)

    return halve(linear.weight[:rows]), halve(linear.bias[:rows]), activation


# --- The plane ---


@dataclass(frozen=True)
class Explorer:
    """z = m_n + sum_k (a_k - v_k . (m_n - c)) v_k: the code m_n of image n, moved to (a_1, a_2) in the plane.

    The page computes E[x | z] at the pointer and at m_n, the reconstruction of the image that is picked.

    Args:
        decoder: Its weights.
        caption: Says what to see.
        codes: (N, L) m_n, such as posterior means.
        images: (N, C, H, W) their images, in 8 bits.
        names: Of the images.
        directions: (2, L) v_k, orthonormal.
        points: (N, 2) v_k . (m_n - c), the codes in the plane.
        start: The image that is picked first.
        extent: The plane shows -extent to extent in both directions.
        labels: (N,) whole numbers from 0 that color the points.
        label_names: Of the labels, for the legend; their numbers where empty.
    """

    decoder: DecoderWeights
    caption: str
    codes: npt.NDArray[np.floating]
    images: npt.NDArray[np.uint8]
    names: Sequence[str]
    directions: npt.NDArray[np.floating]
    points: npt.NDArray[np.floating]
    start: int = 0
    extent: float = 3.0
    labels: npt.NDArray[np.integer] | None = None
    label_names: Sequence[str] = ()

    def _to_json(self) -> str:
        """For a script element, without a "<" that could close it."""
        sheet, columns = _make_sheet(self.images)
        values = {
            "decoder": self.decoder.to_json(),
            "start": self.start,
            "extent": self.extent,
            "codes": _encode_halves(self.codes),
            "directions": self.directions.tolist(),
            "points": _encode_halves(self.points),
            "images": page.encode_base64(sheet),
            "columns": columns,
            "names": list(self.names),
            "labels": None if self.labels is None else page.encode_base64(self.labels.astype("u1")),
        }
        return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

    def _make_legend(self) -> str:
        if self.labels is None:
            return ""
        kinds = np.unique(self.labels).tolist()
        names = self.label_names or [str(kind) for kind in range(max(kinds, default=0) + 1)]
        keys = "".join(f'<li><span class="dot label-{k % 10}"></span>{page.escape(names[k])}</li>' for k in kinds)
        return f'<ul class="legend" aria-label="Colors of the points">{keys}</ul>'

    def to_html(self) -> str:
        """The block as HTML."""
        _, height, width = self.decoder.event_shape
        views = "".join(
            f'<div class="view {name}"><canvas width="{width}" height="{height}" role="img" aria-label="{words}" '
            f'style="aspect-ratio:{width}/{height}"></canvas><p>{words}</p></div>'
            for name, words in text.EXPLORER_VIEWS.items()
        )
        readout = "".join(f"<span>direction {k} = <output></output></span> " for k in (1, 2))
        return (
            f'<figure class="explorer wide"><div class="panel"><div class="stage">'
            f'<div class="pad-box"><canvas class="pad" width="640" height="640" tabindex="0" role="application" '
            f'aria-roledescription="plane of codes" '
            f'aria-label="Plane of codes: direction 1 to the right, direction 2 up. {text.EXPLORER_HELP}"></canvas>'
            f'<p class="readout">{readout}</p></div>'
            f'<div class="views">{views}</div>'
            f'<div class="notes"><p class="help">{text.EXPLORER_HELP}</p>{self._make_legend()}'
            f"<noscript><p>{text.EXPLORER_NO_SCRIPT}</p></noscript></div></div></div>"
            f'<script type="application/json">{self._to_json()}</script>{page.caption_html(self.caption)}</figure>'
        )


def _encode_halves(values: npt.NDArray[np.floating]) -> str:
    return page.encode_base64(np.clip(values, -60000, 60000).astype("<f2"))


def _make_sheet(images: npt.NDArray[np.uint8]) -> tuple[bytes, int]:
    """Images (N, C, H, W) in rows on one PNG, and their number in a row."""
    N, C, H, W = images.shape
    columns = math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    table = np.zeros((rows * columns, C, H, W), np.uint8)
    table[:N] = images
    sheet = table.reshape(rows, columns, C, H, W).transpose(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    png = io.BytesIO()
    Image.fromarray(sheet.squeeze(-1) if C == 1 else sheet).save(png, format="png", optimize=True)
    return png.getvalue(), columns


def make_explorer(run: Run) -> Explorer:
    """The live decoder of a run, over the two directions in which the codes of test images vary most.

    Raises:
        ValueError: A decoder that a page cannot draw, with the reason.
    """
    if run.options.condition != "none":
        raise ValueError("an image has no code here without its label")
    vae = load(run.folder)
    decoder = decoder_weights(vae.likelihood)
    x = data.evaluation_images(run.splits, "test", run.pixels)
    if decoder.latent_dim < 2 or len(x) < 2:
        words = "a page shows a plane of codes, for which two latents and two test images are needed"
        raise ValueError(f"decoder: {words}, got {decoder.latent_dim} and {len(x)}")
    index = data.subset(len(x), max(2, min(_MOST_POINTS, _MOST_PIXELS // math.prod(decoder.event_shape))))
    x = x[index]
    with seeded(_SEED, torch.device("cpu")), torch.no_grad():
        codes = encode(vae, x)
        draws = sample_latents(vae.prior(), _MOST_POINTS)
        active = active_units(codes, compute_moments(vae.prior()).scale).count
    found = find_principal_directions(codes.mean, _MOST_DIRECTIONS)
    points, drawn = found.project(codes.mean)[:, :2], found.project(draws)[:, :2]
    labels = run.splits.labels.get("test")
    classes = None if labels is None else labels[index].numpy()
    few = classes is not None and classes.min() >= 0 and classes.max() < 10
    return Explorer(
        decoder,
        text.explorer_caption(run, float(found.share[:2].sum()), active=active),
        codes=codes.mean.numpy(),
        images=(255 * x.float()).round().clamp(0, 255).byte().numpy(),
        names=[text.EXPLORER_IMAGE.format(place=place) for place in index.tolist()],
        directions=found.directions[:2].numpy(),
        points=points.numpy(),
        start=found.find_central(codes.mean),
        extent=max(1.05 * float(torch.cat([points, drawn]).abs().quantile(_MOST_CODES)), _LEAST_EXTENT),
        labels=classes if few else None,
        label_names=run.splits.class_names if few else (),
    )
