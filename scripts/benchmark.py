"""Time evaluation side by side with the bare matrix products that it cannot do without; print and store the ratio."""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.options import Options, command, parse_benchmark

if TYPE_CHECKING:
    from torch import Tensor

    from ppl_vae import VAE


def matrix_products(vae: VAE, *, pairs: int, total: int) -> float:
    """Seconds for the decoder's matrix products alone, on (total) particle-image pairs, (pairs) at a time."""
    import torch

    pairs = min(pairs, total)
    weights = [layer.weight for layer in vae.likelihood.modules() if isinstance(layer, torch.nn.Linear)]  # type: ignore[attr-defined]
    inputs = [torch.randn(pairs, weight.shape[1]) for weight in weights]
    outputs = [torch.empty(pairs, weight.shape[0]) for weight in weights]
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(total // pairs):
            for h, weight, output in zip(inputs, weights, outputs, strict=True):
                torch.mm(h, weight.T, out=output)
    return (time.perf_counter() - started) * total / (total // pairs * pairs)


def evaluation(vae: VAE, x: Tensor, *, num_particles: int) -> float:
    """Seconds for log p(x) of the images x, with all its errors."""
    from ppl_vae.evidence import evaluate

    started = time.perf_counter()
    evaluate(vae, x, num_particles=num_particles, seed=0)
    return time.perf_counter() - started


def describe(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    asked = parse_benchmark()
    import torch

    from ppl_vae import build, data, runs
    from ppl_vae.evidence import particles_a_pass

    torch.manual_seed(0)
    vae = build.vae(Options(), (1, 28, 28)).eval()
    x = data.evaluation_images(data.load("mnist"), "test", "dynamic")
    x = x[data.subset(len(x), asked.images)]
    pairs, total = particles_a_pass(x), len(x) * asked.num_particles
    timed: dict[str, list[float]] = {"matrix_products": [], "evaluation": []}
    evaluation(vae, x[:2], num_particles=asked.num_particles)
    for round_number in range(asked.rounds):
        timed["matrix_products"].append(matrix_products(vae, pairs=pairs, total=total))
        timed["evaluation"].append(evaluation(vae, x, num_particles=asked.num_particles))
        print(f"round {round_number + 1} of {asked.rounds}: {timed['evaluation'][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in timed.items()}
    result: dict[str, Any] = {
        "images": len(x),
        "num_particles": asked.num_particles,
        "seconds": timed,
        "ratio_of_medians": medians["evaluation"] / medians["matrix_products"],
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "environment": runs.environment("cpu"),
    }
    if asked.output is not None:
        runs.write_json(Path(asked.output), result)
    threads = torch.get_num_threads()
    print(f"log p(x), S = {asked.num_particles:,}, {len(x):,} images, the default decoder, {threads} threads")
    print(f"  decoder's matrix products alone {describe(timed['matrix_products'])}")
    print(f"  evaluation                      {describe(timed['evaluation'])}")
    print(f"  ratio of medians {result['ratio_of_medians']:.2f}; peak memory {result['peak_memory_gb']:.2f} GB")


if __name__ == "__main__":
    command(main)
