"""One run as one HTML page: its likelihood, what stands out, its figures, and its live decoder over two latents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae import data, runs
from ppl_vae.conditional import Conditional
from ppl_vae.diagnostics.pictures import measure_latent_use
from ppl_vae.evidence.moments import encode, sample_latents
from ppl_vae.parts import likelihoods, networks
from ppl_vae.reports.page import blocks as page
from ppl_vae.reports.page.blocks import Block, Picture, Section, Table, Text, VerdictBlock, true_minus
from ppl_vae.reports.run_figures import figure_names
from ppl_vae.reports.text import make_sentence, plus_minus
from ppl_vae.reports.text import pages as text
from ppl_vae.reports.text.diagnosis import describe_advice, describe_left_out
from ppl_vae.reports.text.evaluation import describe_evaluation
from ppl_vae.reports.text.run import describe_model
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run
from ppl_vae.runs.options import format_flag
from ppl_vae.runs.results import Diagnosis, read_evaluation, to_json
from ppl_vae.runtime.global_state import seeded

HalfArray = npt.NDArray[np.float16]

_SEED = 0
_NUM_POINTS = 1000  # codes, and draws of the prior, which the explorer's plane holds nearly all of
_MOST_CODES = 0.995
_LEAST_EXTENT = 1e-3


def make_page(run: Run, step: int, diagnosis: Diagnosis | None, *, split: str) -> str:
    """The page of a run as HTML.

    Args:
        run: The run, evaluated and drawn.
        step: The step of its weights.
        diagnosis: The run's diagnosis, or None if there are too few images.
        split: The split that is diagnosed.
    """
    try:
        explorer: Block = make_explorer(run)
    except ValueError as error:
        explorer = Text(text.NO_EXPLORER.format(reason=make_sentence(str(error))))
    blocks: dict[str, Sequence[Block]] = {
        "likelihood": _likelihood(run, step),
        "verdicts": _verdicts(run, diagnosis, split),
        "explore": [explorer],
        "figures": _pictures(run, figure_names(run)),
        "diagnosis": _pictures(run, list(text.DIAGNOSIS_FIGURES)) if diagnosis else [],
        "setup": _setup(run, step),
    }
    titles = text.SECTIONS | (text.AUTOENCODER_SECTIONS if is_autoencoder(run.options) else {})
    sections = [Section(titles[anchor], found, anchor) for anchor, found in blocks.items() if found]
    return page.page(text.page_title(run), sections, subtitle=make_sentence(describe_model(run)[0]))


def _setup(run: Run, step: int) -> list[Block]:
    """Every option of the run, and its data."""

    def show(value: object) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    options = {name: value for name, value in to_json(run.options).items() if value is not None}
    rows = [[f"`{format_flag(name)}`", show(value)] for name, value in options.items()]
    return [Text(text.describe_setup(run, step)), Table(["option", "value"], rows, text.OPTIONS_CAPTION)]


def _likelihood(run: Run, step: int) -> list[Block]:
    """The evaluation: its numbers, how they were measured, and how far to trust them."""
    entry = read_evaluation(run.folder)
    if entry is None or entry.step != step:
        return [Text(text.describe_missing_evaluation(run))]
    keys = ("reconstruction",) if entry.log_likelihood is None else tuple(text.EVALUATION_ROWS)
    rows = [
        [text.evaluation_row_name(entry, key), true_minus(plus_minus(getattr(entry, key))), text.EVALUATION_ROWS[key]]
        for key in keys
    ]
    caption = text.EVALUATION_CAPTION.format(num_images=entry.num_images)
    highlight = None if is_autoencoder(run.options) else 0
    lines = [line.strip() for line in describe_evaluation(entry)]
    details = [make_sentence(line) for line in lines if not line.startswith(("log-likelihood ", "ELBO "))]
    table = Table(["nats per image", "mean ± standard error", "what it is"], rows, caption, highlight)
    return [table, Text(true_minus(" ".join(details)))]


def _verdicts(run: Run, diagnosis: Diagnosis | None, split: str) -> list[Block]:
    """What stands out, and what could not be measured."""
    if diagnosis is None:
        return [Text(text.TOO_FEW_IMAGES.format(split=split))]
    numbers = diagnosis.numbers
    blocks: list[Block] = [Text(text.MEASURED_ON.format(num_images=numbers.num_images, split=diagnosis.split))]
    blocks += [Text(make_sentence(line)) for line in describe_left_out(numbers)]
    for verdict in diagnosis.verdicts:
        figures = _pictures(run, [verdict.figure] if verdict.figure else [])
        blocks.append(
            VerdictBlock(
                verdict.word,
                true_minus(make_sentence(verdict.evidence)),
                describe_advice(verdict),
                figure=figures[0] if figures else None,
                severity="healthy" if verdict.severity == "note" else "warning",
            )
        )
    return blocks


def _pictures(run: Run, names: Sequence[str]) -> list[Picture]:
    """The figures of the run's folder that exist, with their captions."""
    found = []
    for name in names:
        path, caption = run.folder / runs.FIGURES / name, text.figure_caption(run, name)
        if path.is_file():
            found.append(Picture(path.read_bytes(), caption, caption or Path(name).stem))
    return found


# --- The live decoder ---

# Hidden activations that explorer.js knows; the last layer has "none".
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.GLU: "glu"}


# a(W x + b): W (out, in), b (out,), and the activation a; "glu" is u sigmoid(v) of the two halves.
Layer = tuple[HalfArray, HalfArray, str]


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


_NORMALS = (
    *(likelihoods.Normal, likelihoods.NormalFixed, likelihoods.NormalOptimal, likelihoods.NormalPerPixel),
    *(likelihoods.Laplace, likelihoods.StudentT),
)

# What the mean of a pixel is, by the likelihood. Levels and counts are white at 255, and a normal has the data's unit.
_LINKS: dict[type, Link] = {
    likelihoods.Bernoulli: Link("sigmoid"),
    likelihoods.ContinuousBernoulli: Link("continuous-bernoulli"),
    likelihoods.Beta: Link("sigmoid", bound=10.0),
    likelihoods.Binomial: Link("sigmoid", gain=255.0, white=255.0),
    likelihoods.Poisson: Link("exp", bound=15.0, white=255.0),
    likelihoods.NegativeBinomial: Link("exp", bound=15.0, white=255.0),
    **dict.fromkeys(_NORMALS, Link("identity")),
}


class DecoderWeights(NamedTuple):
    """E[x | z] = link(W_n a(... a(W_1 z + b_1)) + b_n), one feature per pixel of an image (C, H, W), C = 1 or 3."""

    layers: tuple[Layer, ...]
    event_shape: tuple[int, int, int]
    link: Link

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
            "link": self.link.name,
            "bound": self.link.bound if math.isfinite(self.link.bound) else None,
            "scale": self.link.gain / self.link.white,
            "weights": page.encode_base64(np.concatenate(flat).astype("<f2")),
        }


def decoder_weights(likelihood: Callable[[Tensor], Distribution]) -> DecoderWeights:
    """The decoder p(x | z) = family(net(z)) in half precision, with the features that its mean needs.

    Args:
        likelihood: A dense network, and a likelihood whose mean is a function of one feature per pixel.

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
            f"decoder: a page can draw likelihoods whose mean is a function of one feature per pixel, got "
            f"{type(family).__name__}"
        )
    if isinstance(unit := getattr(family, "unit", None), Tensor):
        link = link._replace(gain=float(unit))
    if len(event_shape) != 3 or event_shape[0] not in (1, 3):
        raise ValueError(f"decoder: a page can draw images (1, H, W) or (3, H, W), got event shape {event_shape}")
    layers, modules = [], list(net.layers)  # pairs of a linear map and an activation, in both networks
    for k, (linear, activation) in enumerate(zip(modules[::2], modules[1::2], strict=True)):
        name = _ACTIVATIONS.get(type(activation))
        if name is None or not isinstance(linear, nn.Linear):
            raise ValueError(
                f"decoder: a page can draw dense layers followed by {', '.join(_ACTIVATIONS.values())}, got "
                f"{type(activation).__name__}"
            )
        layers.append(_make_layer(linear, name, f"decoder layer {k}"))
    output = _make_layer(net.output, "none", "decoder output", rows=math.prod(event_shape))
    channels, height, width = event_shape
    return DecoderWeights((*layers, output), (channels, height, width), link)


def _make_layer(linear: nn.Linear, activation: str, name: str, *, rows: int | None = None) -> Layer:
    """The first rows of a layer in half precision."""

    def halve(values: Tensor) -> HalfArray:
        largest = float(np.finfo(np.float16).max)
        if not values.detach().abs().max() <= largest:  # also where it is no number
            words = f"expected weights of at most {largest:.0f} in size (half precision), got larger ones"
            raise ValueError(f"{name}: {words}")
        return values.detach().cpu().numpy().astype(np.float16)

    return halve(linear.weight[:rows]), halve(linear.bias[:rows]), activation


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

    def _to_json(self) -> str:
        """For a script element, without a "<" that could close it."""
        base = np.zeros(self.decoder.latent_dim) if self.base is None else self.base
        values = {
            "decoder": self.decoder.to_json(),
            "start": list(self.start),
            "extent": self.extent,
            "axes": list(self.axes),
            "base": base.tolist(),
            "points": page.encode_base64(np.clip(self.points, -60000, 60000).astype("<f2")),
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

    def to_html(self, number: int) -> str:
        """The block as HTML."""
        (_, height, width), (i, j) = self.decoder.event_shape, self.axes
        return (
            f'<figure class="explorer wide" id="explorer-{number}"><div class="panel"><div class="stage">'
            f'<div class="pad-box"><canvas class="pad" width="640" height="640" tabindex="0" role="application" '
            f'aria-roledescription="plane of two latents" aria-describedby="help-{number}" '
            f'aria-label="Latent plane: latent {i} to the right, latent {j} up"></canvas></div>'
            f'<div class="view"><canvas class="drawn" width="{width}" height="{height}" role="img" '
            f'aria-label="The decoder’s mean at the chosen point" style="aspect-ratio:{width}/{height}"></canvas>'
            f'<p class="readout"><span>z<sub>{i}</sub> = <output class="first"></output></span> '
            f'<span>z<sub>{j}</sub> = <output class="second"></output></span></p></div>'
            f'<div class="notes"><p class="help" id="help-{number}">{text.EXPLORER_HELP}</p>{self._make_legend()}'
            f"<noscript><p>{text.EXPLORER_NO_SCRIPT}</p></noscript></div></div></div>"
            f'<script type="application/json">{self._to_json()}</script>{page.caption_html(self.caption)}</figure>'
        )


def make_explorer(run: Run) -> Explorer:
    """The live decoder over the plane of the two most used latents; the others stay as they are of a first image.

    Raises:
        ValueError: A decoder that a page cannot draw, with the reason.
    """
    vae = load(run.folder)
    decoder = decoder_weights(vae.likelihood)
    if decoder.latent_dim < 2:
        raise ValueError("decoder: a page shows a plane of two latents, got one latent")
    x = data.evaluation_images(run.splits, "test", run.pixels)
    index = data.subset(len(x), _NUM_POINTS)
    with seeded(_SEED, torch.device("cpu")), torch.no_grad():
        codes = encode(vae, x[index])
        use = measure_latent_use(vae, x[index], codes)
        draws = sample_latents(vae.prior(), _NUM_POINTS)
    i, j = sorted(use.values.argsort(descending=True)[:2].tolist())
    points = codes.mean[:, [i, j]].numpy()
    reach = np.quantile(np.abs(np.concatenate([points, draws[:, [i, j]].numpy()])), _MOST_CODES)
    labels = run.splits.labels.get("test")
    classes = None if labels is None else labels[index].numpy()
    few = classes is not None and classes.min() >= 0 and classes.max() < 10
    return Explorer(
        decoder,
        text.explorer_caption(run, (i, j)),
        points,
        start=(float(points[0, 0]), float(points[0, 1])),
        extent=float(max(reach, _LEAST_EXTENT)),
        labels=classes if few else None,
        label_names=run.splits.class_names if few else (),
        axes=(i, j),
        base=codes.mean[0].numpy(),
    )
