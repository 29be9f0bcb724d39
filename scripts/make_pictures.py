"""Draw the pictures of README and the manual, each for a light and a dark page."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.commands.cli import Command, parse
from ppl_vae.runs.options import BOOLEAN, CheckedOptions, option
from ppl_vae.runtime.process import run_script

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

ROOT = Path(__file__).parents[1]
PLAIN = (
    "--prior standard-normal --objective elbo --initialization shrinking --learning-rate 3e-3 --decay-start 0 "
    "--average-decay 0 --epochs 10 --images 100 --evaluation-particles 10"
)
BETAS = ("0.01", "1", "5", "20", "100")
LIKELIHOODS = {  # and whether it is a mass of levels
    "discretized-logistic": True,
    "continuous-bernoulli": False,
    "normal-per-pixel": False,
    "laplace": False,
    "normal": False,
    "binomial": True,
}
COLUMNS, MAGNIFIED = 10, 2


@dataclass(frozen=True)
class Pictures(CheckedOptions):
    """Draw the pictures of README and the manual from mnist-best, stored results and the runs of the two strips."""

    output: str = option(str(ROOT / "docs" / "pictures"), "folder of the pictures")
    runs: str = option("runs/pictures", "folder of the runs of the strips along beta and of likelihoods")
    train: bool = option(False, "train those of these runs that are missing; a minute or two each", BOOLEAN)


INK = {"light": (20, 24, 32), "dark": (240, 244, 250)}  # the color of a pixel that is 1; one that is 0 is transparent
STYLES = {"light": "default", "dark": "dark_background"}  # of matplotlib
Row = tuple[str, "Tensor"]  # words above it, and (N, H, W) images with values in [0, 1]


def main() -> None:
    asked = parse(Command("", Pictures))
    from ppl_vae import data

    output, folder = Path(asked.output), Path(asked.runs)
    output.mkdir(parents=True, exist_ok=True)
    digits = data.load("mnist").test.float() / 255
    draw(output, "samples", samples_of_prior())
    draw(output, "reconstructions", reconstructions(digits))
    draw_study(output)
    draw_chart(output, "recipes", draw_recipes, size=(6.5, 5.0))
    photograph_explorer(output)
    words = {f"beta-{beta}": f"--beta {beta} --keep last" for beta in BETAS}
    words |= {f"likelihood-{word}": f"--dataset fashion-mnist --likelihood {word}" for word in LIKELIHOODS}
    for name, more in words.items():
        if asked.train and not (folder / name / "evaluation.json").exists():
            train = [sys.executable, str(ROOT / "scripts" / "train_svi.py"), *PLAIN.split(), *more.split()]
            if subprocess.run([*train, "--run-dir", str(folder / name)]).returncode:
                raise ValueError(f"{folder / name}: its training failed; the lines above say why")
    if all((folder / f"beta-{beta}").is_dir() for beta in BETAS):
        draw(output, "beta", strip_of_betas(folder, digits))
    else:
        print(f"No strip along beta: its runs are not in {folder}, and --train trains them")
    if all((folder / f"likelihood-{word}").is_dir() for word in LIKELIHOODS):
        draw(output, "likelihoods", strip_of_likelihoods(folder))
    else:
        print(f"No strip of likelihoods: its runs are not in {folder}, and --train trains them")


# --- What is shown ---


def samples_of_prior() -> list[Row]:
    """E[x | z] of the pretrained model at z ~ p(z)."""
    import torch

    from ppl_vae import load
    from ppl_vae.evidence.moments import decode_mean, sample_latents

    torch.manual_seed(0)
    vae = load("mnist-best")
    images = decode_mean(vae, sample_latents(vae.prior(), 4 * 16))
    return [("", row) for row in images.squeeze(1).split(16)]


def reconstructions(digits: "Tensor") -> list[Row]:
    """The first test images as they are and binarized, and what the pretrained model makes of them."""
    import torch

    from ppl_vae import load

    torch.manual_seed(0)
    x = torch.bernoulli(digits[:COLUMNS])
    images = {"test image": digits[:COLUMNS], "binarized": x, "reconstruction": reconstruct(load("mnist-best"), x)[0]}
    return [(name, row.squeeze(1)) for name, row in images.items()]


def reconstruct(vae: Any, x: "Tensor") -> tuple["Tensor", "Tensor"]:
    """E[x | z] and a draw of p(x | z) at the mean of q(z | x)."""
    import torch

    from ppl_vae.evidence.moments import encode

    with torch.no_grad():
        decoded = vae.likelihood(encode(vae, x).mean)
        return decoded.mean, decoded.sample()


def strip_of_betas(folder: Path, digits: "Tensor") -> list[Row]:
    """Reconstructions along beta, with rate and distortion as the study measured them."""
    import torch
    from docs_tables import stored

    from ppl_vae import load

    torch.manual_seed(0)
    x = torch.bernoulli(digits[:COLUMNS])
    found = stored("study")["runs"]
    rows = [("test image, binarized", x.squeeze(1))]
    for beta in BETAS:
        numbers = found[f"mnist-beta-{beta}"]
        rate, distortion = numbers["kl"]["mean"], -numbers["reconstruction"]["mean"]
        words = f"beta {beta}: rate {rate:.1f}, distortion {distortion:.1f}"
        rows.append((words, reconstruct(load(str(folder / f"beta-{beta}")), x)[0].squeeze(1)))
    return rows


def strip_of_likelihoods(folder: Path) -> list[Row]:
    """Means and draws of p(x | z) under six likelihoods, with the bits per dimension of their table."""
    import torch
    from docs_tables import stored

    from ppl_vae import data, load

    torch.manual_seed(0)
    levels = data.load("fashion-mnist").test[: COLUMNS // 2].float()
    bits = {row["likelihood"]: row["bits_per_dim"]["mean"] for row in stored("likelihoods")["rows"]}
    gap = torch.zeros(1, 28, 28)
    test = levels.squeeze(1) / 255
    rows = [("test image, twice", torch.cat([test, gap, test]))]
    for word in LIKELIHOODS:
        vae = load(str(folder / f"likelihood-{word}"))
        is_mass = LIKELIHOODS[word]
        mean, drawn = reconstruct(vae, levels if is_mass else (levels + 0.5) / 256)
        shown = torch.cat([mean.squeeze(1), gap, drawn.squeeze(1)])
        rows.append((f"{word}: {bits[word]:.2f} bits per dim", shown / 255 if is_mass else shown))
    return rows


# --- How it is drawn ---


def draw(output: Path, name: str, rows: list[Row]) -> None:
    """Writes NAME-light.png and NAME-dark.png: rows of images with words above them, in 32 levels."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    gap, tile, line, font = 2, 28 * MAGNIFIED, 34, ImageFont.load_default(19)
    heights = [tile + gap + (line if words else 0) for words, _ in rows]
    canvas = Image.new("L", (len(rows[0][1]) * (tile + gap) - gap, sum(heights) - gap))
    ink = ImageDraw.Draw(canvas)
    for (words, images), bottom in zip(rows, np.cumsum(heights).tolist(), strict=True):
        top = bottom - tile - gap
        ink.text((0, top - 5), words, fill=200, font=font, anchor="ld")
        for j, image in enumerate(images.clamp(0, 1).numpy()):
            small = Image.fromarray(np.rint(255 * image).astype(np.uint8))
            canvas.paste(small.resize((tile, tile), Image.Resampling.BICUBIC), (j * (tile + gap), top))
    colors = np.rint(np.asarray(canvas) * (31 / 255)).astype(np.uint8)
    for page, color in INK.items():
        picture = Image.fromarray(colors, "P")
        picture.putpalette(32 * color)
        opacity = bytes(np.rint(np.linspace(0, 255, 32)).astype(np.uint8))
        picture.save(output / f"{name}-{page}.png", optimize=True, bits=5, transparency=opacity)
    report(output, name)


def report(output: Path, name: str) -> None:
    print(f"{name}: {(output / f'{name}-light.png').stat().st_size / 1024:.0f} kB")


def draw_study(output: Path) -> None:
    """Writes panels of the study's figures from its stored numbers, each narrow enough for a phone."""
    from dataclasses import replace

    from ppl_vae.study import figures
    from ppl_vae.study.results import read_study

    study = read_study(ROOT / "scripts" / "results")
    panels = {
        "rate-distortion": (figures.draw_rate_distortion, "mnist"),
        "active": (figures.draw_active, "mnist"),
        "bounds-mnist": (figures.draw_bounds, "mnist"),
        "bounds-fashion-mnist": (figures.draw_bounds, "fashion-mnist"),
    }
    for name, (draw_panel, dataset) in panels.items():
        draw_chart(output, f"study-{name}", partial(draw_panel, replace(study, datasets=(dataset,))), size=(4.2, 3.4))


def draw_chart(output: Path, name: str, draw_figure: Callable[[], "Figure"], *, size: tuple[float, float]) -> None:
    """Writes NAME-light.png and NAME-dark.png of a figure, with its size in inches."""
    from io import BytesIO

    from matplotlib import style
    from PIL import Image

    for page, words in STYLES.items():
        with style.context(words):
            figure = draw_figure()
            figure.set_size_inches(*size)
            png = BytesIO()
            figure.savefig(png, dpi=200, transparent=True)
        picture = Image.open(png).quantize(64, method=Image.Quantize.FASTOCTREE)
        picture.save(output / f"{name}-{page}.png", optimize=True)
    report(output, name)


def draw_recipes() -> "Figure":
    """L_5000 of each recipe on dynamic MNIST against the minutes of its training, and the numbers in print as lines."""
    from matplotlib import pyplot

    from ppl_vae.runs.recipes import read_reproductions

    rows = read_reproductions(ROOT / "scripts" / "results" / "reproductions.json")
    rows = [row for row in rows if row.protocol.dataset == "mnist"]
    figure, axes = pyplot.subplots(layout="constrained")
    printed = {number.log_likelihood: number.source for row in rows for number in row.published}
    above = -math.inf
    for nats, source in sorted(printed.items()):
        model, _, paper = source.partition(": ")
        words = f"{model} ({paper.split(', arXiv')[0]})"
        place = (-3, 1.5) if nats - above > 0.2 else (-3, -7.5)
        axes.axhline(nats, linewidth=0.8, linestyle="--", color="gray")
        where = ("axes fraction", "data")
        axes.annotate(words, (1, nats), place, where, "offset points", ha="right", fontsize=6.5, color="gray")
        above = nats
    for recipe in dict.fromkeys(row.recipe for row in rows):
        own = [row for row in rows if row.recipe == recipe]
        minutes = [sum(row.seconds.training) / 60 for row in own]
        bounds = [row.ours.mean for row in own]
        axes.errorbar(minutes, bounds, [row.ours.stderr for row in own], fmt="o", markersize=4, linewidth=1)
        below = bounds[0] - own[0].ours.stderr
        axes.annotate(recipe, (minutes[0], below), (0, -9), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="minutes of training", ylabel="L_5000, nats per image", xlim=(0, 1.05 * axes.get_xlim()[1]))
    axes.set_title("Dynamic MNIST: recipes here, and numbers in print (dashed)", fontsize=10)
    return figure


def photograph_explorer(output: Path) -> None:
    """Writes explorer-light.png and explorer-dark.png, the live decoder as chromium shows it."""
    from io import BytesIO
    from tempfile import TemporaryDirectory

    from PIL import Image

    from ppl_vae.reports.page.blocks import Section, page
    from ppl_vae.reports.page.explorer import make_explorer
    from ppl_vae.runs.open import open_run

    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("No picture of the explorer: it needs chromium, and pip install playwright")
        return
    with TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder) / "page.html"
        path.write_text(page("Explorer", [Section("", [make_explorer(open_run("mnist-best")).to_html()], "explore")]))
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in INK:
            window = {"width": 660, "height": 900}  # narrow, for words that are large enough
            tab = browser.new_page(viewport=window, device_scale_factor=1.5, color_scheme=scheme)  # type: ignore
            tab.goto(path.as_uri())
            tab.wait_for_function("() => document.querySelector('.picked p').textContent.includes('no.')")
            seen = Image.open(BytesIO(tab.locator(".explorer .stage").screenshot()))
            picture = seen.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)  # keeps rare colors
            picture.save(output / f"explorer-{scheme}.png", optimize=True)
        browser.close()
    report(output, "explorer")


if __name__ == "__main__":
    run_script(main)
