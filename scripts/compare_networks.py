"""One table: each network's weights, seconds an epoch, and log p(x) after the same time of training."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ppl_vae.options import Options, command, parse_networks

_CALIBRATION_STEPS = 40


def seconds_an_epoch(options: Options) -> float:
    """What an epoch of training takes here, from a few steps of a throw-away VAE."""
    import torch

    from ppl_vae import build, data, fit

    splits = build.splits(options)
    options = build.resolve(options, splits)
    stored, observe = data.training_images(splits, options.binarization or "none")
    some = stored[: _CALIBRATION_STEPS * options.batch_size]
    torch.manual_seed(0)
    vae = build.vae(options, splits.event_shape)
    ended: list[float] = []
    fit(
        vae,
        some,
        epochs=3,  # the first runs with validation on, and warms up
        observe=observe,
        batch_size=options.batch_size,
        learning_rate=1e-12,
        on_epoch=lambda record: ended.append(time.perf_counter()),
    )
    return min(after - before for before, after in pairwise(ended)) * len(stored) / len(some)


def row(folder: Path, network: str) -> dict[str, Any]:
    """A trained run's line of the table, from its files."""
    from ppl_vae import load, runs

    entry, metrics = runs.read_evaluations(folder)["test"], runs.read_metrics(folder)
    keys = ("split", "binarization", "num_images", "num_particles", "log_likelihood", "elbo", "rise", "floor")
    return {
        "network": network,
        "weights": sum(w.numel() for w in load(folder).parameters()),
        "epochs": metrics[-1]["epoch"],
        "seconds": metrics[-1]["seconds"],
        "seconds_an_epoch": metrics[-1]["seconds"] / metrics[-1]["epoch"],
        "best_epoch": max(metrics, key=lambda record: record["validation_elbo_nats_per_image"])["epoch"],
        **{key: entry[key] for key in keys},
    }


def main() -> None:
    asked = parse_networks()
    from ppl_vae import experiment, runs

    parent = Path(asked.run_dir or f"runs/networks-{Path(asked.dataset).stem}")
    rows = []
    for network in asked.networks:
        options = Options(
            dataset=asked.dataset,
            data_dir=asked.data_dir,
            network=network,
            images=asked.images,
            evaluation_particles=asked.num_particles,
        )
        folder = parent / network
        if (folder / runs.CONFIG).exists():
            experiment.resume(str(folder), epochs=None, say=print)  # a table that was interrupted goes on
        else:
            epochs = max(1, math.floor(60 * asked.minutes / seconds_an_epoch(options)))
            experiment.train(replace(options, epochs=epochs), str(folder), say=print)
        rows.append(row(folder, network))
    if asked.output is not None:
        table = {"dataset": asked.dataset, "minutes": asked.minutes, "rows": rows}
        runs.write_json(Path(asked.output), table | {"environment": runs.environment("cpu")})
    print(f"{'network':15} {'weights':>10} {'s/epoch':>8} {'epochs':>6} {'log p(x), nats':>17} {'ELBO':>9}")
    for line in rows:
        nats = f"{line['log_likelihood']['mean']:.2f} ± {line['log_likelihood']['stderr']:.2f}"
        print(
            f"{line['network']:15} {line['weights']:>10,} {line['seconds_an_epoch']:>8.1f} {line['epochs']:>6} "
            f"{nats:>17} {line['elbo']['mean']:>9.2f}"
        )
    print(
        f"Paired differences: python scripts/compare_runs.py {' '.join(str(parent / name) for name in asked.networks)}"
    )


if __name__ == "__main__":
    command(main)
