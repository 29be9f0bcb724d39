"""The page, in a real browser: it needs no network, shows what it is given, and draws what torch would."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Visit

from ppl_vae.conditional import Conditional
from ppl_vae.parts import likelihoods, networks
from ppl_vae.reports.page.blocks import Section, page, picture, table, text, verdict
from ppl_vae.reports.page.explorer import Explorer, decoder_weights

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


def explorer(likelihood: Conditional | None = None, *, num_points: int = 3, **options: Any) -> Explorer:
    """Over codes of a plane that goes through all coordinates, and their images of random levels."""
    weights = decoder_weights(likelihood or decoder())
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(weights.latent_dim, 2)))[0].T
    codes = rng.normal(size=(num_points, weights.latent_dim))
    codes[0] *= 0.1
    return Explorer(
        weights,
        "Caption of the explorer",
        codes=codes,
        images=rng.integers(0, 256, size=(num_points, *weights.event_shape), dtype=np.uint8),
        names=[f"image {n}" for n in range(num_points)],
        directions=directions,
        points=codes @ directions.T,
        **options,
    )


def everything() -> list[Section]:
    long_word = "runs/" + "a-very-long-name-of-a-run-folder" * 4
    wide = [[f"row {k}", *(-86.125 * k,) * 9, "−86.1 ± 0.2"] for k in range(3)]
    return [
        Section("First words", [text("A **bold** word, some `code`.\n\nAnother paragraph.")], "first-words"),
        Section(
            "Numbers",
            [
                table(["name", *(f"column {k}" for k in range(9)), "bound"], wide, "Caption of the table", highlight=1),
                verdict("over-regularized", f"KL 0.1 nats in {long_word}", f"Train again: {long_word} --beta 1"),
                verdict("healthy", "All is well.", is_healthy=True, figure=picture(png(90), "A figure", "gray")),
            ],
            "numbers",
        ),
        Section(
            "The plane",
            [
                picture(png(200, 900, 30), "Light alone", "a band"),
                explorer(num_points=50, labels=np.arange(50) % 10).to_html(),
            ],
            "plane",
        ),
    ]


@pytest.fixture
def visit(chromium: Any, tmp_path: Path) -> Callable[..., Visit]:
    """Writes a page to disk and opens it there."""

    def opened(*blocks: Any, title: str = "A page", **options: Any) -> Visit:
        shown = [block.to_html() if isinstance(block, Explorer) else block for block in blocks]
        sections = [Section("Only one", shown, "only")] if blocks else everything()
        path = tmp_path / "page.html"
        path.write_text(page(title, sections, subtitle="What it says."), encoding="utf-8")
        return Visit(chromium, path, **options)

    return opened


# --- Complete in itself ---


def test_opening_and_using_a_page_asks_for_no_other_file_and_logs_nothing(visit) -> None:
    with visit() as seen:
        seen.tab.locator("canvas.pad").hover()
        seen.frame()
        asked = [address for address in seen.requests if not address.startswith("data:")]
        assert (asked, seen.complaints) == ([seen.tab.url], [])
        assert seen.tab.url.startswith("file:")


def test_a_page_names_no_address_of_a_network() -> None:
    without_pictures = re.sub(r"data:image/png;base64,[\w+/=]*", "", page("A page", everything()))
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+/|\burl\(|@import|\bsrc=[\"'](?!\")", without_pictures) == []


def test_a_phone_shows_a_wide_picture_whole_and_an_option_unbroken(visit) -> None:
    words = "A sentence in front, of such a length that the line ends here: --num-particles 5."
    with visit(text(words), picture(png(0, 1200, 300), "", "a picture"), width=390) as seen:
        assert seen.tab.evaluate("document.querySelector('img').getBoundingClientRect().width") <= 390
        assert seen.tab.evaluate("document.querySelector('main code').getClientRects().length") == 1
        assert seen.tab.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(
    "words", ["<script>window.hit = 1</script>", '"><img src=x onerror=window.hit=1>', "</style>&amp;"]
)
def test_markup_in_words_is_shown_as_it_was_written(visit, words: str) -> None:
    blocks = [
        text(words),
        verdict(words, words, words),
        table([words], [[words]], words),
        picture(png(2), words, words),
        explorer(labels=np.zeros(3, dtype=int), label_names=[words]),
    ]
    with visit(*blocks, title=words) as seen:
        assert seen.tab.title() == words
        assert seen.tab.locator("h1").inner_text() == words
        assert seen.tab.evaluate("window.hit") is None
        assert seen.tab.locator(f"[alt={words!r}]" if '"' in words else f'[alt="{words}"]').count() == 1
        assert seen.complaints == []


def test_words_cannot_close_the_data_of_an_explorer(visit) -> None:
    """What stands in a script element is escaped otherwise than text."""
    with visit(explorer(label_names=["</script>"] * 10, labels=np.zeros(3, dtype=int))) as seen:
        assert seen.tab.locator(".legend").inner_text().strip() == "</script>"


# --- What is shown ---


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1204500, "1,204,500"), (-86.1254, "−86.13"), (12345.6, "12,346"), (None, "–"), (np.int64(20000), "20,000")],
)
def test_a_number_is_written_as_people_read_it(value: object, shown: str) -> None:
    assert f'<td class="number">{shown}</td>' in page("t", [Section("s", [table(["n"], [[value]])], "s")])  # type: ignore[list-item]


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
    "dropout": lambda *sizes, **options: networks.GatedMLP(*sizes, dropout=0.3, **options).eval(),
    "silu": lambda *sizes, **options: networks.MLP(*sizes, activation=torch.nn.SiLU, **options),
}
PLACES = [(0.0, 0.0), (1.5, -0.5), (-2.75, 2.25), (3.0, 3.0)]


DECODERS = {
    (name, latent_dim): decoder(latent_dim, network=NETWORKS[name]) for name in NETWORKS for latent_dim in (2, 5)
}


def code_at(block: Explorer, place: tuple[float, float], *, picked: int = 0) -> torch.Tensor:
    """(L,) the code that the page decodes at a place of the plane, in the page's precision."""
    codes, points = (each.astype(np.float16).astype(float) for each in (block.codes, block.points))
    return torch.tensor(codes[picked] + (place - points[picked]) @ block.directions, dtype=torch.float)


@pytest.fixture(scope="module")
def all_decoders(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """One page with an explorer of each network, and then of each likelihood."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    by_network = [explorer(likelihood).to_html() for likelihood in DECODERS.values()]
    by_family = [explorer(of_family(family)).to_html() for family in FAMILIES]
    path.write_text(page("All", [Section("All", [*by_network, *by_family], "all")]), encoding="utf-8")
    with Visit(chromium, path) as seen:
        yield seen


@pytest.mark.parametrize("key", DECODERS, ids=str)
def test_the_explorer_draws_the_mean_that_torch_computes(all_decoders: Visit, key: tuple[str, int]) -> None:
    likelihood = DECODERS[key]
    for place in PLACES:
        exact = likelihood(code_at(explorer(likelihood), place)).mean
        assert exact.std() > 0.05
        shown = shown_pixels(all_decoders, place, k=list(DECODERS).index(key))
        torch.testing.assert_close(shown, exact.flatten(), rtol=0, atol=1e-2)


FAMILIES = [
    likelihoods.Bernoulli,
    likelihoods.Normal,
    likelihoods.NormalFixed,
    likelihoods.NormalOptimal,
    likelihoods.NormalPerPixel,
    likelihoods.Laplace,
    likelihoods.StudentT,
]


def of_family(family: type) -> Conditional:
    likelihood = decoder(family=family, spread=2.5)
    if hasattr(likelihood.family, "unit"):
        likelihood.family.unit.fill_(0.1)
    return likelihood


@pytest.mark.parametrize("family", FAMILIES)
def test_the_explorer_draws_the_mean_of_every_likelihood_that_it_takes(all_decoders: Visit, family: type) -> None:
    likelihood = of_family(family)
    for place in PLACES:
        exact = likelihood(code_at(explorer(likelihood), place)).mean.clamp(0, 1)
        assert ((exact > 0) & (exact < 1)).float().mean() > 0.2
        shown = shown_pixels(all_decoders, place, k=len(DECODERS) + FAMILIES.index(family))
        torch.testing.assert_close(shown, exact.flatten(), rtol=0, atol=1e-2)


def levels_of(seen: Visit, view: str) -> np.ndarray:
    """(H, W) the red levels of a canvas."""
    script = f"""() => {{
      const canvas = document.querySelector(".{view} canvas");
      const {{ data }} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return Array.from(data).filter((_, k) => k % 4 === 0);
    }}"""
    return np.array(seen.tab.evaluate(script)).reshape(SHAPE[1:])


def means_of(block: Explorer, picked: int) -> np.ndarray:
    """(H, W) the levels of the reconstruction, E[x | z] at the code."""
    return 255 * decoder(5)(torch.tensor(block.codes[picked], dtype=torch.float)).mean[0].detach().numpy()


def test_a_picked_point_shows_its_image_and_the_decoders_mean_at_its_code(visit) -> None:
    block = explorer(decoder(5), num_points=20, start=4, extent=4.0)
    with visit(block) as seen:
        seen.tab.wait_for_function("() => document.querySelector('.picked p').textContent === 'image 4'")
        seen.frame()
        shown = {name: levels_of(seen, name) for name in ("moved", "picked", "rebuilt")}
        np.testing.assert_array_equal(shown["picked"], block.images[4, 0])
        np.testing.assert_allclose(shown["rebuilt"], means_of(block, 4), atol=3)
        np.testing.assert_array_equal(shown["moved"], shown["rebuilt"])

        box = seen.tab.locator("canvas.pad").bounding_box()
        right, up = (block.points[7] / block.extent + 1) / 2
        seen.tab.mouse.click(box["x"] + right * box["width"], box["y"] + (1 - up) * box["height"])
        seen.frame()
        assert seen.tab.locator(".picked p").inner_text() == "image 7"
        np.testing.assert_array_equal(levels_of(seen, "picked"), block.images[7, 0])
        np.testing.assert_allclose(levels_of(seen, "rebuilt"), means_of(block, 7), atol=3)

        place = (1.5, -2.0)
        exact = decoder(5)(code_at(block, place, picked=7)).mean.flatten()
        torch.testing.assert_close(shown_pixels(seen, place), exact, rtol=0, atol=1e-2)


def test_keys_move_pick_and_return(visit) -> None:
    block = explorer(decoder(5), num_points=20, start=4, extent=4.0)
    with visit(block) as seen:
        pad = seen.tab.locator("canvas.pad")
        pad.press("ArrowRight")
        pad.press("Shift+ArrowUp")
        seen.frame()
        place = block.points[4] + [0.1, 0.5]
        outputs = [float(words.replace("−", "-")) for words in seen.tab.locator("output").all_inner_texts()]
        np.testing.assert_allclose(outputs, place, atol=0.01)
        pad.press("Enter")
        nearest = np.linalg.norm(block.points - place, axis=1).argmin()
        assert seen.tab.locator(".picked p").inner_text() == f"image {nearest}"
        pad.press("Home")
        assert seen.tab.locator(".picked p").inner_text() == "image 4"


# --- What is refused, in words ---


def _many() -> Conditional:
    net = networks.MLP(2, 35, hidden=[2000, 4000])
    return Conditional(net, likelihoods.Bernoulli(SHAPE))


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
    "similar likelihoods, got DiscretizedLogistic": lambda: decoder(family=likelihoods.DiscretizedLogistic),
    "ends in a likelihood, got Linear": lambda: torch.nn.Linear(2, 35),
    "images": lambda: decoder(shape=(9,)),
    "half precision": _large,
    "8,000,000 weights": _many,
    "got Softplus": lambda: decoder(
        network=lambda *sizes, **options: networks.MLP(*sizes, activation=torch.nn.Softplus, **options)
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_decoder_that_a_page_cannot_draw_is_refused_in_words(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoder_weights(REFUSED[words]())
