"""A run's model card in Markdown, from its files alone: what it is, of which data, its numbers and its limits.

Whatever a file names (a data set, a device) stands in code spans, where Markdown and HTML mean nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ppl_vae import data, runs
from ppl_vae.data.registry import SPLITS
from ppl_vae.reports.text.certificate import describe_certificate
from ppl_vae.reports.text.evaluation import describe_evaluation
from ppl_vae.runs.build import build_vae, is_autoencoder
from ppl_vae.runs.open import Run
from ppl_vae.runs.options import is_export
from ppl_vae.runs.results import Evaluation, from_json

CARD = "README.md"
_MOST_CHARACTERS = 200  # of a name
_CERTIFICATE = "certificate-"


def make_card(run: Run, evaluations: dict[str, Any], *, step: int, figures: Sequence[str] = ()) -> str:
    """The model card in Markdown, with YAML front matter for hubs.

    Args:
        run: the run; its images are not looked at.
        evaluations: the entries of evaluation.json that are of these weights.
        step: of the weights.
        figures: names in the folder figures beside the card.

    Raises:
        ValueError: a file of the run is damaged.
    """
    sections = [
        _front_matter(run),
        f"# A VAE of {code(run.splits.name)}",
        _what_it_is(run),
        "## Numbers\n\n" + _numbers(run, evaluations),
        "## Data\n\n" + _data(run),
        "## Training\n\n" + _training(run, step),
        "## Limits\n\n" + _limits(run, evaluations),
        "## How to load it\n\n" + _loading(run),
        *(["## Figures\n\n" + _pictures(figures)] if figures else []),
        "## License\n\nNot said yet: fill in the license of these weights, which that of the data may bind.",
    ]
    return "\n\n".join(sections) + "\n"


def code(value: object) -> str:
    """A Markdown code span of one line, in which nothing is markup."""
    text = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in str(value))).strip()
    text = text.replace("`", "'")
    cut = text[:_MOST_CHARACTERS] + "..." * (len(text) > _MOST_CHARACTERS)
    return f"`{cut or '(no name)'}`"


def block(lines: Sequence[str]) -> str:
    """Lines as an indented Markdown code block, which no line can end."""
    clean = ("".join(c if c.isprintable() else " " for c in line) for part in lines for line in part.splitlines())
    return "\n".join(f"    {line}" for line in clean)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _front_matter(run: Run) -> str:
    tags = ["variational-autoencoder", "density-estimation", "pyro", f"likelihood-{run.options.likelihood}"]
    lines = ["---", "library_name: ppl_vae", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if run.options.dataset in data.DATASETS:
        lines += ["datasets:", f"- {json.dumps(run.options.dataset)}"]
    return "\n".join([*lines, "# license: fill in", "---"])


def _what_it_is(run: Run) -> str:
    options, E = run.options, run.splits.event_shape
    with torch.device("meta"):  # shapes without numbers
        num_weights = sum(w.numel() for w in build_vae(options, E).parameters())
    latents = " + ".join(map(str, (options.latent_dim, *(options.upper_latents or ()))))
    hidden = ", ".join(map(str, options.hidden or ()))
    if is_autoencoder(options):
        opening = "A plain autoencoder: its guide is deterministic. It has no log-likelihood, and is no density."
    else:
        opening = "A variational autoencoder, p(x, z) = p(z) p(x | z) with the guide q(z | x), by the package ppl_vae."
    transform = ", of the logits of pixels (the Jacobian is counted)" * (options.transform == "logit")
    facts = [
        f"Likelihood p(x | z): {options.likelihood}, a {run.scale}{transform}.",
        f"Prior p(z): {options.prior}. Guide q(z | x): {options.posterior}.",
        f"Latents: {latents}. Network: {options.network}, hidden layers {hidden or 'as the network has them'}; "
        f"{num_weights:,} weights.",
        f"One x has the shape ({', '.join(map(str, E))}), {math.prod(E):,} numbers.",
    ]
    return f"{opening}\n\n{_bullets(facts)}"


def _numbers(run: Run, evaluations: dict[str, Any]) -> str:
    parts = []
    for split in SPLITS:
        if split in evaluations:
            parts.append(_told(_describe_entry, evaluations[split], split))
    certificates = [key for key in evaluations if key.startswith(_CERTIFICATE)]
    for key in sorted(certificates):
        words = _told(describe_certificate, evaluations[key], key)
        parts.append(f"Certificate, {code(key.removeprefix(_CERTIFICATE))} split:\n\n{words}")
    if not any(split in evaluations for split in SPLITS):
        parts.append("There is no evaluation of these weights.")
    elif "test" not in evaluations:
        parts.append("There is no evaluation of the test split.")
    if not certificates and not is_autoencoder(run.options):
        parts.append("There is no certificate: log p(x) has no second bound beside importance sampling.")
    if any(split in evaluations for split in SPLITS) and not is_autoencoder(run.options):
        parts.insert(
            0,
            "In nats an image, the mean ± its standard error over images. A log-likelihood here is an "
            "importance-weighted bound: a lower bound in expectation, and not the value of log p(x).",
        )
    return "\n\n".join(parts)


def _describe_entry(entry: dict[str, Any]) -> list[str]:
    return describe_evaluation(from_json(Evaluation, entry))


def _told(describe: Any, entry: dict[str, Any], key: str) -> str:
    try:
        return block(describe(entry))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{runs.EVALUATION}: damaged: {key!r} is not what an evaluation writes ({error!r})") from None


def _data(run: Run) -> str:
    options, splits = run.options, run.splits
    facts = [
        f"Data set: {code(splits.name)}, {splits.kind}; SHA-256 {code(splits.sha256)}.",
        f"Splits: {_splits(run)}. How many images each split has is not in the run's files; each number says of "
        "how many it is.",
        f"The model sees {_SEEN[run.evaluated_pixels]}.",
        f"Binarization: {options.binarization}. Dequantization: {options.dequantization}.",
    ]
    return _bullets(facts)


_SEEN = {
    "dynamic": "zeros and ones (x = 1 with the probability that the pixel is: a level / 255)",
    "fixed": "zeros and ones (x = 1 with the probability that the pixel is, a level / 255, drawn once)",
    "threshold": "zeros and ones (1 from one half upwards)",
    "none": "numbers as they are (8-bit levels as level / 255)",
    "levels": "levels from 0 to 255",
    "dequantized": "(level + u) / 256, u uniform",
}


def _splits(run: Run) -> str:
    """How the data became training, validation and test images."""
    options = run.options
    if options.dataset in data.DATASETS:
        return f"the {options.protocol} protocol"
    words = "as the data names them; what it lacks is a tenth of the images each, by a fixed permutation"
    if options.image_size is not None:
        size = "x".join(str(n) for n in (options.image_size[0], options.image_size[-1]))
        words += f". Images were brought to {size} ({options.fit})"
    return words


def _training(run: Run, step: int) -> str:
    if is_export(runs.read_json(run.folder / runs.CONFIG)):
        return f"Not in the files of an export, but for the step of the weights: {step:,}."
    options, facts = run.options, [f"Weights of step {step:,}."]
    if run.from_python:
        facts.append("Trained from Python, or shipped: how is not in the run's files, beyond the options below.")
    seconds = _seconds(run)
    facts += [
        f"{trained_epochs(run).words}.",
        f"Batches of {options.batch_size:,}, Adam from {options.learning_rate:g}, objective {options.objective}, "
        f"beta {options.beta:g}, KL warm-up {options.warmup_epochs:,} epochs.",
        f"Seed {options.seed}: one training, whose numbers say nothing of how others would differ.",
        f"Kept: the {options.keep} weights; moving average {options.average_decay:g}; precision {options.precision}.",
        f"Time: {seconds:,.0f} s." if seconds is not None else "How long it took is not in the run's files.",
        *_made_with(run),
    ]
    return _bullets(facts)


class TrainedEpochs(NamedTuple):
    """How far a training came in words, and whether it is unfinished."""

    words: str
    unfinished: bool


def trained_epochs(run: Run) -> TrainedEpochs:
    """The trained epochs by the last record of metrics.jsonl, compared with the epochs in the options.

    Raises:
        ValueError: the records are damaged.
    """
    records, asked = runs.read_metrics(run.folder), run.options.epochs
    done = records[-1].get("epoch") if records else None
    if type(done) is not int:
        return TrainedEpochs(f"{asked:,} epochs by the options; how many were trained is not in the run's files", False)
    if run.from_python or done >= asked:
        return TrainedEpochs(f"{done:,} epoch{'s' * (done != 1)}", False)
    return TrainedEpochs(f"{done:,} of {asked:,} epochs: the training was not finished", True)


def _seconds(run: Run) -> float | None:
    records = runs.read_metrics(run.folder)
    value = records[-1].get("seconds") if records else None
    return value if isinstance(value, int | float) else None


def _made_with(run: Run) -> list[str]:
    path = run.folder / runs.ENVIRONMENT
    if not path.exists():
        return ["Versions and device are not in the run's files."]
    found = runs.read_json(path)
    packages = found.get("packages")
    if not isinstance(packages, dict):
        raise ValueError(f"{path}: damaged: expected an object under packages, got {type(packages).__name__}")
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None)
    resumed = found.get("resumed")
    times = len(resumed) if isinstance(resumed, list) else 0
    facts = [f"Versions: {code(versions)}, Python {code(found.get('python'))}. Device: {code(found.get('device'))}."]
    return facts + [f"Resumed {times} times." if times > 1 else "Resumed once."] * (times > 0)


def _limits(run: Run, evaluations: dict[str, Any]) -> str:
    limits = []
    if is_autoencoder(run.options):
        limits.append(
            "It gives reconstructions alone; log p(x | z(x)) is not a log-likelihood, and compares with none."
        )
    else:
        limits.append(f"Its nats are of a {run.scale}, and compare with no number on another scale or protocol.")
        if run.pixels == "dequantized":
            limits.append(
                "`load` gives a density of (level + u) / 256; `dequantized(load(...))` is the mass of levels that the "
                "numbers are of."
            )
        elif "density" in run.scale:
            limits.append("A density can be above 1 and its log above 0; where values lie on a grid it has no bound.")
        limits += [
            "A high log p(x) does not say that an image is like the training data: smooth and simple images of another "
            "kind can score higher (Nalisnick et al. 2019, arXiv 1810.09136). It finds no outliers by itself.",
            _reliability(evaluations),
        ]
    limits.append("Nothing here was checked beyond the images that the numbers are of: no fairness, no other source.")
    return _bullets([limit for limit in limits if limit])


def _reliability(evaluations: dict[str, Any]) -> str:
    told = [split for split in SPLITS if split in evaluations and evaluations[split].get("num_particles", 1) > 1]
    if not told:
        return ""
    return (
        "Where Pareto k-hat is above 0.5 the importance weights have no variance that the errors could rest on: the "
        "Monte Carlo error and the jackknife are then floors, and unreliable images are a rough sieve."
    )


def _loading(run: Run) -> str:
    S, shape = 1000, ", ".join(map(str, run.splits.event_shape))
    lines = ["from ppl_vae import load, log_evidence", "", 'vae = load("path/to/this/folder")']
    if run.pixels == "dequantized":
        lines[0] = "from ppl_vae import dequantized, load, log_evidence"
        lines[2] = 'vae = dequantized(load("path/to/this/folder"))'
    if is_autoencoder(run.options):
        lines = [lines[0].replace(", log_evidence", ""), "", lines[2], f"z = vae.posterior(x).mean  # x: (N, {shape})"]
    else:
        lines.append(
            f"nats = log_evidence(vae.model, vae.guide, x, num_particles={S})  # x: (N, {shape}) as the model sees it"
        )
    lines.append("images = vae.likelihood(vae.prior().sample((16,))).mean")
    return "```python\n" + "\n".join(lines) + "\n```"


def _pictures(figures: Sequence[str]) -> str:
    words = {"prior_samples.png": "Samples of the model", "reconstructions.png": "Images and their reconstructions"}
    return "\n\n".join(f"![{words[name]}]({runs.FIGURES}/{name})" for name in figures)
