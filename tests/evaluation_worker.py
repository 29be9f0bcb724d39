"""Evaluations that several processes share, as torchrun would start them: one of the processes.

python evaluation_worker.py OUTPUT RANK PORT WORLD_SIZE [PORT WORLD_SIZE ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from oracles import LinearGaussian

from ppl_vae import runs
from ppl_vae.evidence.evaluation import evaluate, reconstruction
from ppl_vae.evidence.importance import Importance
from ppl_vae.runtime import batching
from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.batching import Stopped

# (images, particles) at 12 pairs a pass.
CASES = {
    "ragged last group": (13, 1),
    "ragged groups of two images": (13, 5),
    "more particles than a pass takes": (7, 40),
    "fewer images than ranks": (1, 40),
    "fewer groups than ranks": (13, 2),
}
SEED = 11


def small_passes() -> None:
    """12 pairs of a particle and an image of LinearGaussian's."""
    batching.PASS_BYTES["cpu"] = 12 * 8 * 6 * 6


def model_and_images(num_images: int):
    oracle = LinearGaussian.random()
    return oracle.vae(widen=1.4), oracle.draw(num_images)


def stack(result: Importance) -> torch.Tensor:
    """The numbers of each image (N, 9)."""
    return torch.stack(list(result.to_tensors().values()), dim=1)


def all_cases() -> dict[str, torch.Tensor]:
    """(N, 9) of each case, and the reconstructions."""
    found = {}
    for name, (num_images, S) in CASES.items():
        vae, x = model_and_images(num_images)
        found[name] = stack(evaluate(vae, x, num_particles=S, seed=SEED))
    vae, x = model_and_images(31)
    found["reconstruction"] = reconstruction(vae, x, seed=SEED)
    return found


def error_of(call) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "none"


def together(rank: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The cases' numbers, and how each asked end of an evaluation looks on this rank."""
    vae, x = model_and_images(13)
    whole = stack(evaluate(vae, x, num_particles=40, seed=SEED))
    broken = x.clone()
    broken[1] = torch.inf  # on the support of a normal; the second rank's

    def stopped() -> None:
        kept = {}
        try:
            evaluate(vae, x, num_particles=40, seed=SEED, on_block=kept.__setitem__, should_stop=lambda: rank == 1)
        except Stopped:
            done = kept if rank == 0 else {}
            taken_up = stack(evaluate(vae, x, num_particles=40, seed=SEED, done=done))
            assert 0 < len(kept) < 13
            assert torch.equal(taken_up, whole)
            raise

    def disk_is_full(first: int, rows: torch.Tensor) -> None:
        if rank == 0:
            raise OSError("no space left")

    ends = {
        "not finite": error_of(lambda: evaluate(vae, broken, num_particles=40, seed=SEED)),
        "stopped": error_of(stopped),
        "not kept": error_of(lambda: evaluate(vae, x, num_particles=40, seed=SEED, on_block=disk_is_full)),
    }
    return all_cases(), ends


def main() -> None:
    output, rank, *worlds = sys.argv[1:]
    small_passes()
    for port, size in zip(worlds[::2], worlds[1::2], strict=True):
        if int(rank) >= int(size):
            continue
        os.environ.update(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=size,
            LOCAL_WORLD_SIZE=size,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        distributed.join("cpu")
        tensors, ends = together(int(rank))
        runs.save_tensors(Path(output) / f"{size}-{rank}.safetensors", tensors, ends)
        distributed.leave()


if __name__ == "__main__":
    main()
