"""Compare a semi-supervised VAE that knows few labels with its classifier trained on these labels alone.

Each run has all images of MNIST and other labels, by its seed. The supervised classifier has the same network,
labels and weights to start from, sees the same images with labels, and takes as many steps. Its
learning rate is constant, and its weights are the last. Accuracies of both are those of all 10,000 test images,
binarized as the models see them; log p(x) and the classifier that follows from it are of 1,000.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.commands.cli import Command, parse
from ppl_vae.runs.files import check_output
from ppl_vae.runs.options import NON_NEGATIVE_INTEGER, NOT_EMPTY, POSITIVE_INTEGER, PRECISIONS, CheckedOptions, option
from ppl_vae.runtime.process import run_script

if TYPE_CHECKING:
    from torch import nn

    from ppl_vae.runs.open import Run


@dataclass(frozen=True)
class CompareLabels(CheckedOptions):
    """Train semi-supervised VAEs and supervised classifiers with few labels of MNIST, and compare them."""

    labels: tuple[int, ...] = option((100, 600, 1000, 3000), "numbers of labels", POSITIVE_INTEGER)
    seeds: int = option(5, "draws of the labels, each with weights of its own", POSITIVE_INTEGER)
    plain_seeds: int = option(2, "draws with the fewest labels for plain M2, without consistency", NON_NEGATIVE_INTEGER)
    epochs: int = option(6, "passes through all images", POSITIVE_INTEGER)
    precision: str = option("float32", "--precision of the VAEs", PRECISIONS)
    run_dir: str = option("runs/labels", "folder of the run folders", NOT_EMPTY)
    output: str | None = option(None, "JSON file of the results (default: printed only)", NOT_EMPTY)


def accuracy(classifier: nn.Module, run: Run) -> float:
    """The share of all test images whose most probable label is their own."""
    from ppl_vae import data
    from ppl_vae.evidence.classes import classify

    found = classify(classifier, data.evaluation_images(run.splits, "test", run.pixels))
    return float((found == run.splits.labels["test"]).double().mean())


def train_supervised(run: Run) -> nn.Module:
    """The run's classifier with fresh weights, trained on its labelled images alone for as many steps."""
    import pyro
    import torch

    from ppl_vae import data
    from ppl_vae.runs.build import build_vae
    from ppl_vae.runs.resolve import count_steps, initialize_output_bias

    splits, options = run.splits, run.options
    pyro.set_rng_seed(options.seed)
    vae = build_vae(options, splits.event_shape)
    initialize_output_bias(vae, data.initialization_images(splits, run.pixels))
    classifier = vae.get_submodule("classifier")
    stored, transform = data.training_images(splits, run.pixels)
    _, images, labels = data.add_labelled_images(
        stored, run.known_labels("train"), transform, seed=options.seed
    ).further
    optimizer = torch.optim.Adam(classifier.parameters(), lr=options.learning_rate)
    for _ in range(count_steps(options, len(stored))):
        rows = torch.randint(len(images), (options.batch_size,))
        optimizer.zero_grad()
        (-classifier(images[rows].float()).log_prob(labels[rows]).mean()).backward()
        optimizer.step()
    return classifier.eval()


def main() -> None:
    asked = parse(Command("", CompareLabels))
    if asked.output is not None:
        check_output(Path(asked.output))
    import numpy as np

    from ppl_vae import runs
    from ppl_vae.commands.run_series import check_runs, train_or_resume
    from ppl_vae.runs.load import load
    from ppl_vae.runs.options import Options
    from ppl_vae.runs.resolve import load_splits
    from ppl_vae.runs.results import LabelledEvaluation, read_evaluation

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def summarize(values: list[float]) -> dict[str, Any]:
        stderr = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "stderr": stderr, "values": values}

    made_with = {key: value for key, value in runs.describe_environment("cpu").items() if key != "argv"}
    rows: list[dict[str, Any]] = []
    like = None
    planned = [(number, 1.0, asked.seeds) for number in asked.labels]
    plain = [(min(asked.labels), 0.0, asked.plain_seeds)] if asked.plain_seeds else []
    for number, consistency, seeds in planned + plain:
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            options = Options(
                labels=number,
                label_consistency=consistency,
                seed=seed,
                epochs=asked.epochs,
                batch_size=200,
                warmup_epochs=1,
                images=1000,
                evaluation_particles=50,
                compile="on",
                precision=asked.precision,
            )
            folder = Path(asked.run_dir) / f"{number}-{seed}{'-plain' * (not consistency)}"
            check_runs({folder: options}, load_splits(options))
            like = train_or_resume(folder, options, like, say=say, draw=False)
            evaluation = read_evaluation(folder)
            assert isinstance(evaluation, LabelledEvaluation)
            assert evaluation.log_likelihood is not None
            numbers = {
                "classifier": accuracy(load(folder).get_submodule("classifier"), like),
                "density": evaluation.accuracy.mean,
                "supervised": accuracy(train_supervised(like), like),
                "log_likelihood": evaluation.log_likelihood.mean,
                "seconds": runs.read_metrics(folder)[-1]["seconds"],
            }
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
            say(f"{number} labels, consistency {consistency:g}, seed {seed}: {numbers}")
        summaries = {name: summarize(values) for name, values in found.items()}
        rows.append({"labels": number, "consistency": consistency, "seeds": seeds} | summaries)
        if asked.output is not None:
            settings = {"epochs": asked.epochs, "precision": asked.precision}
            table = {"rows": rows, **settings, "environment": made_with}
            runs.write_json(Path(asked.output), table)


if __name__ == "__main__":
    run_script(main)
