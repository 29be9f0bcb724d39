"""The page, in a real browser: it needs no network, shows what it is given, and draws what torch would."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Visit

from ppl_vae.conditional import Conditional
from ppl_vae.parts import likelihoods, networks
from ppl_vae.reports.page.blocks import Picture, Section, Slider, SliderStop, Table, Text, VerdictBlock, page
from ppl_vae.reports.page.run import Explorer, decoder_weights

SHAPE = (1, 7, 5)  # higher than wide, so that rows and columns cannot be mistaken


def png(gray: int, width: int = 8, height: int = 4) -> bytes:
    """A picture of one gray, by the format's own definition."""
    rows = (b"\0" + bytes([gray] * width)) * height

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def decoder(
    latent_dim: int = 2,
    *,
    network: Callable[..., Any] = networks.MLP,
    family: Callable[..., Any] = likelihoods.Bernoulli,
    shape: tuple[int, ...] = SHAPE,
    spread: float = 2.0,
) -> Conditional:
    """Of random weights, large enough that the means are not all alike."""
    torch.manual_seed(0)
    pixels = family(shape)
    likelihood = Conditional(network(latent_dim, pixels.num_features, hidden=[24, 16]), pixels)
    with torch.no_grad():
        for weight in likelihood.net.parameters():
            weight.mul_(spread)
    return likelihood


def explorer(likelihood: Conditional | None = None, **options: Any) -> Explorer:
    points = options.pop("points", np.zeros((1, 2)))
    return Explorer(decoder_weights(likelihood or decoder()), "Caption of the explorer", points, **options)


def slider() -> Slider:
    stops = [
        SliderStop(f"{10**k:g}", [("reconstructions", png(20 * k)), ("samples", png(9 * k + 1))], {"KL": f"{k}.5 nats"})
        for k in range(3)
    ]
    return Slider("beta", stops, "Caption of the slider", fixed=("originals", png(255)), start=1)


def everything() -> list[Section]:
    long_word = "runs/" + "a-very-long-name-of-a-run-folder" * 4
    wide = [[f"row {k}", *(-86.125 * k,) * 9, "−86.1 ± 0.2"] for k in range(3)]
    rng = np.random.default_rng(0)
    return [
        Section("First words", [Text("A **bold** word, some `code`.\n\nAnother paragraph."), slider()], "first-words"),
        Section(
            "Numbers",
            [
                Table(["name", *(f"column {k}" for k in range(9)), "bound"], wide, "Caption of the table", highlight=1),
                VerdictBlock("over-regularized", f"KL 0.1 nats in {long_word}", f"Train again: {long_word} --beta 1"),
                VerdictBlock(
                    "healthy", "All is well.", severity="healthy", figure=Picture(png(90), "A figure", "gray")
                ),
            ],
            "numbers",
        ),
        Section(
            "The plane",
            [
                Picture(png(200, 900, 30), "Light alone", "a band"),
                explorer(points=rng.normal(size=(50, 2)), labels=np.arange(50) % 10),
            ],
            "plane",
        ),
    ]


@pytest.fixture
def visit(chromium: Any, tmp_path: Path) -> Callable[..., Visit]:
    """Writes a page to disk and opens it there."""

    def opened(*blocks: Any, title: str = "A page", **options: Any) -> Visit:
        sections = [Section("Only one", blocks, "only")] if blocks else everything()
        path = tmp_path / "page.html"
        path.write_text(page(title, sections, subtitle="What it says."), encoding="utf-8")
        return Visit(chromium, path, **options)

    return opened


# --- Complete in itself ---


def test_opening_and_using_a_page_asks_for_no_other_file_and_logs_nothing(visit) -> None:
    with visit() as seen:
        seen.tab.locator("input[type=range]").press("ArrowRight")
        seen.tab.locator("canvas.pad").hover()
        seen.frame()
        asked = [address for address in seen.requests if not address.startswith("data:")]
        assert (asked, seen.complaints) == ([seen.tab.url], [])
        assert seen.tab.url.startswith("file:")


def test_a_page_names_no_address_of_a_network() -> None:
    without_pictures = re.sub(r"data:image/png;base64,[\w+/=]*", "", page("A page", everything()))
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+/|\burl\(|@import|\bsrc=[\"'](?!\")", without_pictures) == []


@pytest.mark.parametrize(
    "words", ["<script>window.hit = 1</script>", '"><img src=x onerror=window.hit=1>', "</style>&amp;"]
)
def test_markup_in_words_is_shown_as_it_was_written(visit, words: str) -> None:
    stop = SliderStop(words, [(words, png(1))], {words: words})
    blocks = [
        Text(words),
        VerdictBlock(words, words, words),
        Table([words], [[words]], words),
        Picture(png(2), words, words),
        Slider(words, [stop], words, (words, png(3))),
        explorer(points=np.zeros((1, 2)), labels=np.zeros(1, dtype=int), label_names=[words]),
    ]
    with visit(*blocks, title=words) as seen:
        assert seen.tab.title() == words
        assert seen.tab.locator("h1").inner_text() == words
        assert seen.tab.evaluate("window.hit") is None
        assert seen.tab.locator(f"[alt={words!r}]" if '"' in words else f'[alt="{words}"]').count() == 1
        assert seen.complaints == []


def test_words_cannot_close_the_data_of_an_explorer(visit) -> None:
    """What stands in a script element is escaped otherwise than text."""
    with visit(
        explorer(label_names=["</script>"] * 10, points=np.zeros((1, 2)), labels=np.zeros(1, dtype=int))
    ) as seen:
        assert seen.tab.locator(".legend").inner_text().strip() == "</script>"


# --- What is shown ---


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1204500, "1,204,500"), (-86.1254, "−86.13"), (12345.6, "12,346"), (None, "–"), (np.int64(20000), "20,000")],
)
def test_a_number_is_written_as_people_read_it(value: object, shown: str) -> None:
    assert f'<td class="number">{shown}</td>' in page("t", [Section("s", [Table(["n"], [[value]])], "s")])  # type: ignore[list-item]


# --- The explorer ---

_PIXELS = """([k, z]) => {
  window.pplExplorer.explorerSet(k, ...z);
  return window.pplExplorer.explorerPixels(k);
}"""


def shown_pixels(seen: Visit, z: tuple[float, float], *, k: int = 0) -> torch.Tensor:
    """(C H W), of the k-th explorer once it is moved to z."""
    return torch.tensor(seen.tab.evaluate(_PIXELS, [k, list(z)]), dtype=torch.float)


NETWORKS = {
    "mlp": networks.MLP,
    "gated": networks.GatedMLP,
    "tanh": lambda *sizes, **options: networks.MLP(*sizes, activation=torch.nn.Tanh, **options),
    "silu": lambda *sizes, **options: networks.MLP(*sizes, activation=torch.nn.SiLU, **options),
}
PLACES = [(0.0, 0.0), (1.5, -0.5), (-2.75, 2.25), (3.0, 3.0)]


DECODERS = {
    (name, latent_dim): decoder(latent_dim, network=NETWORKS[name]) for name in NETWORKS for latent_dim in (2, 5)
}


@dataclass(frozen=True)
class Moved:
    """Which latents an explorer moves, and where the others stay."""

    axes: tuple[int, int]
    base: torch.Tensor

    def z(self, place: tuple[float, float]) -> torch.Tensor:
        z = self.base.clone()
        z[list(self.axes)] = torch.tensor(place)
        return z


def moved(latent_dim: int) -> Moved:
    return Moved((latent_dim - 1, 0), torch.linspace(-1, 1, latent_dim))


@pytest.fixture(scope="module")
def all_decoders(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """One page with an explorer of each network, and then of each likelihood."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    by_network = [
        explorer(likelihood, base=moved(latent_dim).base.numpy(), axes=moved(latent_dim).axes)
        for (_, latent_dim), likelihood in DECODERS.items()
    ]
    by_family = [explorer(of_family(family)) for family in FAMILIES]
    path.write_text(page("All", [Section("All", [*by_network, *by_family], "all")]), encoding="utf-8")
    with Visit(chromium, path) as seen:
        yield seen


@pytest.mark.parametrize("key", DECODERS, ids=str)
def test_the_explorer_draws_the_mean_that_torch_computes(all_decoders: Visit, key: tuple[str, int]) -> None:
    likelihood = DECODERS[key]
    for place in PLACES:
        exact = likelihood(moved(key[1]).z(place)).mean
        assert exact.std() > 0.05
        shown = shown_pixels(all_decoders, place, k=list(DECODERS).index(key))
        torch.testing.assert_close(shown, exact.flatten(), rtol=0, atol=1e-2)


FAMILIES = {  # and the mean that is white
    likelihoods.ContinuousBernoulli: 1.0,
    likelihoods.Beta: 1.0,
    likelihoods.Binomial: 255.0,
    likelihoods.Poisson: 255.0,
    likelihoods.NegativeBinomial: 255.0,
    likelihoods.Normal: 1.0,
    likelihoods.NormalFixed: 1.0,
    likelihoods.NormalOptimal: 1.0,
    likelihoods.NormalPerPixel: 1.0,
    likelihoods.Laplace: 1.0,
    likelihoods.StudentT: 1.0,
}


def of_family(family: type) -> Conditional:
    likelihood = decoder(family=family, spread=2.5)
    if hasattr(likelihood.family, "unit"):
        likelihood.family.unit.fill_(0.1)
    return likelihood


@pytest.mark.parametrize("family", FAMILIES)
def test_the_explorer_draws_the_mean_of_every_likelihood_that_it_takes(all_decoders: Visit, family: type) -> None:
    likelihood = of_family(family)
    for place in PLACES:
        exact = (likelihood(torch.tensor(place)).mean / FAMILIES[family]).clamp(0, 1)
        assert ((exact > 0) & (exact < 1)).float().mean() > 0.2
        shown = shown_pixels(all_decoders, place, k=len(DECODERS) + list(FAMILIES).index(family))
        torch.testing.assert_close(shown, exact.flatten(), rtol=0, atol=1e-2)


# --- What is refused, in words ---


def _large() -> Conditional:
    likelihood = decoder()
    with torch.no_grad():
        likelihood.net.output.weight[0, 0] = 1e5
    return likelihood


def _convolutional() -> Conditional:
    net = networks.ConvDecoder(2, (1, 8, 8), 64, channels=[4], hidden=[8])
    return Conditional(net, likelihoods.Bernoulli((1, 8, 8)))


REFUSED = {
    "dense networks": _convolutional,
    "one feature per pixel, got DiscretizedLogistic": lambda: decoder(family=likelihoods.DiscretizedLogistic),
    "ends in a likelihood, got Linear": lambda: torch.nn.Linear(2, 35),
    "images": lambda: decoder(shape=(9,)),
    "half precision": _large,
    "got Softplus": lambda: decoder(
        network=lambda *sizes, **options: networks.MLP(*sizes, activation=torch.nn.Softplus, **options)
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_decoder_that_a_page_cannot_draw_is_refused_in_words(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoder_weights(REFUSED[words]())
