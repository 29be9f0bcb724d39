"""One run as one HTML page: what it is, its likelihood, what stands out, its figures, and its decoder to play with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppl_vae import data, runs
from ppl_vae.commands.diagnose import choose_split, diagnose_run
from ppl_vae.commands.options import Diagnose, Report
from ppl_vae.conditional import Conditional
from ppl_vae.evidence.moments import encode, sample_latents
from ppl_vae.reports import page as report
from ppl_vae.reports.page import Block, Explorer, Picture, Section, Table, Text, VerdictBlock, true_minus
from ppl_vae.reports.run_figures import figure_names, is_drawn, use_of_latents, write_figures
from ppl_vae.reports.text.diagnosis import describe_advice, describe_left_out
from ppl_vae.reports.text.evaluation import describe_evaluation, plus_minus
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.evaluations import is_evaluated, read_diagnosis, read_evaluation
from ppl_vae.runs.fields import format_flag
from ppl_vae.runs.load import load
from ppl_vae.runs.opening import Run, Say, open_run
from ppl_vae.runs.options import Options, to_json
from ppl_vae.runs.results import Diagnosis, Evaluation
from ppl_vae.runtime.global_state import seeded

REPORT = "report.html"

_SEED = 0
_NUM_POINTS = 1000  # codes in the explorer's plane
_EXTENT = 3.0  # of a standard normal prior; of others and of an autoencoder, what holds nearly all draws and codes
_MOST_CODES = 0.99
_PRIOR_POINTS = 1000
_NORMAL = "standard-normal"
_FEWEST_DIAGNOSED = 4
_LEAST_EXTENT = 1e-3


def report_run(options: Report, *, say: Say) -> Path:
    """Writes one self-contained page of a run; draws and diagnoses it first, where that is not done.

    Args:
        options: The command's options.
        say: Takes each line for the reader.

    Returns:
        The page.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, or a file that cannot be written; then
            there is no page.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir)
    path = run.folder / REPORT if options.output is None else Path(options.output)
    _check_file(path, ours=options.output is None)
    step = runs.load_step(run.folder / runs.MODEL)
    if not is_drawn(run):
        write_figures(run, say=say)
    diagnosis = _diagnosis(run, step, say=say, dataset=options.dataset, data_dir=options.data_dir)
    runs.write_bytes(path, _page(run, step, diagnosis).encode())
    say(f"The page of this run: {path}")
    return path


_HEAD = 1000  # bytes of a page, within which its generator stands


def _check_file(path: Path, *, ours: bool) -> None:
    """Before the work, not after it. What is there is written over where it is a page, or the name is ``ours``."""
    if path.is_dir():
        raise ValueError(f"--output: expected a file, but {path} is a folder")
    if path.exists() and not ours and report.GENERATOR.encode() not in path.read_bytes()[:_HEAD]:
        raise ValueError(f"--output: expected a new file, or an earlier page, but {path} is neither")
    if not path.parent.is_dir():
        raise ValueError(f"--output: expected a file in a folder that is there, but {path.parent} is not")
    runs.check_writable(path.parent)


def _diagnosis(run: Run, step: int, *, say: Say, dataset: str | None, data_dir: str | None) -> Diagnosis | None:
    """diagnosis.json of these weights, measured now if there is none; None if there are too few images."""
    stored = read_diagnosis(run.folder)
    if stored is not None and stored.step == step:
        return stored
    if len(getattr(run.splits, choose_split(run))) < _FEWEST_DIAGNOSED:
        return None
    return diagnose_run(Diagnose(str(run.folder), dataset=dataset, data_dir=data_dir), say=say)


def _page(run: Run, step: int, diagnosis: Diagnosis | None) -> str:
    what = "autoencoder" if is_autoencoder(run.options) else "VAE"
    sections = [
        _likelihood(run),
        _verdicts(run, diagnosis),
        _exploration(run),
        _drawn("Training and pictures", run, figure_names(run), "figures"),
        _drawn("Behind the verdicts", run, list(_DIAGNOSIS_CAPTIONS), "diagnosis") if diagnosis else None,
        _setup(run, step),
    ]
    return report.page(
        f"{run.folder.resolve().name}: one {what} of {run.splits.name}",
        [section for section in sections if section is not None and section.blocks],
        subtitle=_in_words(run),
    )


# --- What it is ---


def _in_words(run: Run) -> str:
    """The run in a sentence or two."""
    options = run.options
    latents = f"{options.latent_dim:,} latent" + "s" * (options.latent_dim != 1)
    if options.upper_latents:
        above = " and ".join(f"{count:,}" for count in options.upper_latents)
        latents = f"{latents} next to the image, {above} in the layers above them"
    if is_autoencoder(options):
        how = "a plain autoencoder: a deterministic code and no prior in its training"
    else:
        how = f"objective {options.objective} at beta = {options.beta:g}"
    parts = [f"a {options.likelihood} likelihood"]
    parts += [f"a {options.prior} prior"] * (not is_autoencoder(options))
    parts += [f"a {options.posterior} posterior"] * (options.posterior not in (Options().posterior, "delta"))
    return (
        f"A {options.network} network with {latents}, {' and '.join(parts)}, trained for "
        f"{options.epochs} epochs; {how}."
    )


def _setup(run: Run, step: int) -> Section:
    """Every option that the run has, and what its data is."""
    words = f"{run.splits.describe()}\n\nThe weights are those of step {step:,}; its folder is `{run.folder}`."
    words += " Its training is elsewhere: in Python, or before it was shipped." if run.from_python else ""
    rows = [
        [f"`{format_flag(name)}`", _option(value)] for name, value in to_json(run.options).items() if value is not None
    ]
    table = Table(["option", "value"], rows, "Every option of the run; config.json holds the same.")
    return Section("What was trained", [Text(words), table], anchor="setup")


def _option(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- Its likelihood ---


def _likelihood(run: Run) -> Section:
    autoencoder = is_autoencoder(run.options)
    title = "How well it reconstructs" if autoencoder else "How likely it finds test images"
    entry = read_evaluation(run.folder) if is_evaluated(run.folder) else None
    if entry is None:
        command = "" if autoencoder else f"`python scripts/evaluate_log_likelihood.py {run.folder}` makes one."
        words = f"There is no evaluation of the test images with these weights. {command}".strip()
        return Section(title, [Text(words)], anchor="likelihood")
    keys = ("reconstruction",) if entry.log_likelihood is None else tuple(_MEANINGS)
    rows = [[_name(key, entry), true_minus(plus_minus(getattr(entry, key))), _MEANINGS[key]] for key in keys]
    table = Table(
        ["nats an image", "mean ± standard error", "what it is"],
        rows,
        f"{entry.num_images:,} test images. The standard error is over images: how far the mean would move with "
        "other test images. It does not know what another training would give.",
        highlight=None if autoencoder else 0,
    )
    return Section(title, [table, Text(_details(entry))], anchor="likelihood")


def _details(entry: Evaluation) -> str:
    """What else the evaluation says, but for the numbers of the table: how it was measured and how far to trust it."""
    lines = [line.strip() for line in describe_evaluation(entry)]
    others = [line for line in lines if not line.startswith(("log-likelihood ", "ELBO "))]
    return true_minus(" ".join(map(_sentence, others)))


_MEANINGS = {
    "log_likelihood": "a lower bound on log p(x), tighter with more importance samples: the number to compare by",
    "elbo": "the bound of one sample, which training maximizes at beta = 1: reconstruction minus KL",
    "reconstruction": "log p(x | z) with z drawn from the guide: how well the code's image fits",
    "kl": "KL(q(z | x) || p(z)): what the code costs, more than which it cannot tell of the image",
}


def _name(key: str, entry: Evaluation) -> str:
    names = {"log_likelihood": f"log p(x): L_{entry.num_particles}", "elbo": "ELBO", "kl": "KL"}
    return names.get(key, key)


# --- What stands out ---


def _verdicts(run: Run, diagnosis: Diagnosis | None) -> Section:
    if diagnosis is None:
        few = f"There are fewer than {_FEWEST_DIAGNOSED} {choose_split(run)} images: too few for a diagnosis."
        return Section("What stands out", [Text(few)], anchor="verdicts")
    text = Text(f"Measured on {diagnosis.numbers.num_images:,} images of the {diagnosis.split} split.")
    blocks: list[Block] = [text, *(Text(_sentence(line)) for line in describe_left_out(diagnosis.numbers))]
    for verdict in diagnosis.verdicts:
        blocks.append(
            VerdictBlock(
                verdict.word,
                true_minus(_sentence(verdict.evidence)),
                describe_advice(verdict),
                figure=_picture(run, verdict.figure) if verdict.figure else None,
                severity="healthy" if verdict.severity == "note" else "warning",
            )
        )
    return Section("What stands out", blocks, anchor="verdicts")


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


# --- Figures ---

_CAPTIONS = {
    "training_curves.png": "Training. Look whether the validation curve still rises at the end (train longer) or falls "
    "behind the training curve (the network learns the training images by heart).",
    "reconstructions.png": "Test images, and what is left of them after the code. Look for strokes and textures that "
    "are lost.",
    "prior_samples.png": "What the decoder makes of draws from the prior. They should look like the data, and differ "
    "from each other.",
    "interpolations.png": "Straight lines between the codes of two images. Each step should be one image, not two laid "
    "over each other.",
    "traversals.png": "One latent at a time is moved. A row in which nothing changes is a latent that is not used.",
    "manifold.png": "The whole plane of two latents, decoded.",
    "latents.png": "Codes of test images. They should fill the circles of the prior, without gaps or far outliers.",
    "log_likelihoods.png": "log p(x) is a mean over images that differ much. Look at the least likely ones.",
    "particles.png": "The bound rises with importance samples. Flat at its right end, it may have settled; with a "
    "k-hat above 0.7 rare particles carry it, and it can be flat and still too low.",
}
_DIAGNOSIS_CAPTIONS = {
    "diagnosis-latents.png": "What each latent tells, and how much its mean varies over images; those near zero are "
    "unused.",
    "diagnosis-aggregate.png": "All codes together against the prior, latent by latent: the bars should be short.",
    "diagnosis-elbo.png": "The ELBO in parts: reconstruction, information about the image, and the distance of "
    "all codes from the prior.",
    "diagnosis-noise.png": "The data's directions in units of the likelihood's noise; a linear "
    "decoder near the state that ignores z learns those above the line.",
    "diagnosis-holes.png": "Decoded prior draws that the images' smoothed posteriors cover least, beside ordinary ones "
    "and reconstructions.",
    "diagnosis-pictures.png": "How sharp reconstructions are, and how much they differ, against the data.",
    "diagnosis-pixels.png": "Whether pixels are distributed as the likelihood says: the bars should be level.",
}

# Of priors that circles do not describe.
_LEARNED_CAPTIONS = {
    "latents.png": "Codes of test images, and draws of the prior in gray. Each should be where the other is.",
    "traversals.png": "One latent at a time is moved, over scales of the prior. A row in which nothing changes is a "
    "latent that is not used; where the prior itself puts nothing, there may be no image.",
}

# Of what a plain autoencoder is not: its training has no prior, and asks codes for nothing but reconstructions.
_AUTOENCODER_CAPTIONS = {
    "training_curves.png": "Training. The reconstruction term alone: look whether the validation curve still rises at "
    "the end (train longer) or falls behind the training curve (the network learns the training images by heart).",
    "prior_samples.png": "Draws of a standard normal, decoded: no samples of a model. Training asked no codes to lie "
    "where these are, so they need not look like the data.",
    "interpolations.png": "Straight lines between the codes of two images. Between codes the decoder was not trained, "
    "and what stands there may be no image.",
    "manifold.png": "The whole plane of two latents, decoded, most of it perhaps far from any code.",
    "latents.png": "Codes of test images, and the circles of a standard normal for scale: training asked no code to "
    "lie within them.",
    "diagnosis-latents.png": "How much each latent varies over images; those near zero are unused.",
    "diagnosis-aggregate.png": "All codes together against a standard normal, latent by latent. No prior was in the "
    "training, so long bars are no fault.",
}


def _has_a_standard_normal(run: Run) -> bool:
    """For a prior of all of z; with several layers of latents it is that of the top alone."""
    return run.options.prior == _NORMAL and not run.options.upper_latents


def _picture(run: Run, name: str) -> Picture | None:
    """A figure of the run's folder with its caption; None where it is not there."""
    path = run.folder / runs.FIGURES / name
    if not path.is_file():
        return None
    by_kind = {} if _has_a_standard_normal(run) else _LEARNED_CAPTIONS
    by_kind = _AUTOENCODER_CAPTIONS if is_autoencoder(run.options) else by_kind
    caption = (_CAPTIONS | _DIAGNOSIS_CAPTIONS | by_kind).get(name, "")
    return Picture(path.read_bytes(), caption, caption or Path(name).stem)


def _drawn(title: str, run: Run, names: list[str], anchor: str) -> Section:
    pictures = [picture for name in names if (picture := _picture(run, name)) is not None]
    return Section(title, pictures, anchor=anchor)


# --- The explorer ---


def _exploration(run: Run) -> Section:
    title = "Move through its latent space"
    try:
        block: Block = _explorer(run)
    except ValueError as error:
        block = Text(f"There is no live picture here. {_sentence(str(error))}")
    return Section(title, [block], anchor="explore")


def _explorer(run: Run) -> Explorer:
    """The two most used latents, the others in the middle.

    Raises:
        ValueError: a decoder that a page cannot draw, in words.
    """
    vae = load(run.folder)
    if not isinstance(vae.likelihood, Conditional):
        raise ValueError("decoder: a page can draw dense networks that end in a likelihood, got a program of its own")
    decoder = report.decoder_weights(vae.likelihood)
    if decoder.latent_dim < 2:
        raise ValueError("decoder: a page shows a plane of two latents, got one latent")
    x = data.evaluation_images(run.splits, "test", run.pixels)
    index = data.subset(len(x), _NUM_POINTS)
    with seeded(_SEED, torch.device("cpu")), torch.no_grad():
        codes = encode(vae, x[index])
        use = use_of_latents(vae, x[index], codes)
        z = sample_latents(vae.prior(), _PRIOR_POINTS)
    order = use.values.argsort(descending=True)[:2].tolist()
    axes = (min(order), max(order))
    autoencoder = is_autoencoder(run.options)
    points = codes.mean[:, list(axes)].numpy()
    labels = run.splits.labels.get("test")
    classes = None if labels is None else labels[index].numpy()
    few = classes is not None and classes.min() >= 0 and classes.max() < 10
    normal = _has_a_standard_normal(run) and not autoencoder
    center = torch.zeros(decoder.latent_dim) if normal else codes.mean.mean(0) if autoencoder else codes.mean[0]
    seen = points if normal or autoencoder else np.concatenate([points, z[:, list(axes)].numpy()])
    reach = float(np.quantile(np.abs(seen), _MOST_CODES))
    return Explorer(
        decoder,
        _explorer_caption(run, axes, autoencoder),
        start=(float(points[0, 0]), float(points[0, 1])),
        extent=max(_EXTENT, reach) if normal or autoencoder else max(_LEAST_EXTENT, reach),
        points=points,
        labels=classes if few else None,
        label_names=run.splits.class_names if few else (),
        axes=axes,
        base=center.numpy(),
    )


def _explorer_caption(run: Run, axes: tuple[int, int], autoencoder: bool) -> str:
    L = run.options.latent_dim
    words = "Each point is a test image, where the encoder puts it; the picture is the decoder's mean."
    if L > 2:
        middle = "at the prior's mean" if _has_a_standard_normal(run) else "as they are of the first picture's image"
        words += (
            f" Moved are z{axes[0]} and z{axes[1]}, the two of {L} that tell most; the others stay "
            f"{'at the mean of all codes' if autoencoder else middle}, so a point's picture is not the reconstruction "
            "of its image."
        )
    if autoencoder:
        words += " Nothing asked these codes to lie together: between them the decoder was never trained."
    return words
