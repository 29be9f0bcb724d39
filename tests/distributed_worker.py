"""Trains small VAEs in 1, 2 or 3 processes, of which each is a fork of one that has imported torch already.

    python tests/distributed_worker.py FOLDER NUM_RANKS CASE ...

Rank 0 writes FOLDER/CASE.safetensors, the training state; what a case says on each rank is FOLDER/CASE.RANK.txt.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from fitting import fit
from pyro.poutine.messenger import unwrap
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppl_vae import data
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.resolve import build_objective
from ppl_vae.runtime import ranks as distributed
from ppl_vae.training import TrainingStopped

SHAPE = (1, 4, 4)
NUM_IMAGES = 21  # batches of 10, 10 and 1, of which the last leaves a rank without an image
EPOCHS = 17  # 51 steps

FLOW = {"posterior": "flow", "posterior_layers": 1, "posterior_hidden": (5,)}
UPPER = {"upper_latents": (2,), "upper_hidden": (5,)}

# options, and arguments of fit
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "elbo": ({}, {}),
    "particles": ({"num_particles": 3}, {"warmup_epochs": 2, "beta": 2.0}),
    "analytic": ({"kl": "analytic"}, {"average_decay": 0.9}),
    "full": ({"posterior": "full"}, {}),
    "iaf": (FLOW, {"skip_norm": 60.0}),
    "spline": (FLOW | {"posterior_flow": "spline"}, {}),
    "delta": ({"posterior": "delta", "beta": 0.0}, {"beta": 0.0}),
    "free bits": ({"objective": "free-bits", "free_bits": 0.05, "num_particles": 2}, {}),
    "iwae": ({"objective": "iwae", "num_particles": 3}, {}),
    "dreg": ({"objective": "dreg", "num_particles": 3}, {}),
    "stl": ({"objective": "stl", "num_particles": 2}, {}),
    "top-down": (UPPER, {}),
    "bottom-up": (UPPER | {"inference": "bottom-up", "objective": "iwae", "num_particles": 2}, {}),
    "vamp": ({"prior": "vamp", "prior_components": 3}, {}),
    "flow prior": ({"prior": "flow", "prior_layers": 1, "prior_hidden": (5,)}, {}),
    "clipped": ({}, {"clip_norm": 1.0}),
    "refitted": ({"likelihood": "normal-optimal"}, {}),
    "small batches": ({}, {"batch_size": 2, "epochs": 5}),
    "single precision": ({}, {}),
    "streamed": ({}, {"stream": True}),
    "compiled": ({}, {"compile": True, "average_decay": 0.9}),
    "compiled dreg": (FLOW | {"objective": "dreg", "num_particles": 2}, {"compile": True, "skip_norm": 60.0}),
}


def images() -> Tensor:
    """(N, 1, 4, 4) probabilities of a white pixel."""
    return torch.rand(NUM_IMAGES, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.double)


def built(words: dict[str, Any]) -> tuple[Any, Any]:
    options = Options(**(PLAIN | {"network": "mlp", "hidden": (6,), "latent_dim": 3} | words))
    pyro.set_rng_seed(0)
    return build_vae(options, SHAPE), build_objective(options)


def train(case: str, **more: Any) -> Any:
    """The state after training, of a VAE in float64 (unless the case says otherwise) on images drawn anew."""
    words, arguments = CASES.get(case, ({}, {}))
    dtype = torch.float if case == "single precision" else torch.double
    torch.set_default_dtype(dtype)
    vae, objective = built(words)

    def transform(values: Tensor, generator: torch.Generator | None) -> Tensor:
        return data.sample_bernoulli(values.to(dtype), generator).to(dtype)

    settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 10, "learning_rate": 0.01, "objective": objective}
    x = images()
    return fit(
        vae.to(dtype), x, transform(x[:9], torch.Generator()), transform=transform, **(settings | arguments | more)
    )


def saved_by(state: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, scalars = state.to_tensors()
    return {name: w.detach().clone() for name, w in tensors.items()}, scalars


def of_case(case: str, folder: Path) -> str:
    """Trains; returns the loss of each epoch in words."""
    states, losses = [], []
    more: dict[str, Any] = {}
    if (folder / "from.safetensors").exists():  # of ``interrupted``
        more["saved"] = load_file(folder / "from.safetensors"), json.loads((folder / "from.json").read_text())
    train(
        case,
        on_checkpoint=lambda state: states.append(saved_by(state)),
        on_epoch=lambda record: losses.append(record["train_loss_nats_per_image"]),
        **more,
    )
    if distributed.is_writer():
        save_file(states[-1][0], folder / f"{case}.safetensors")
    return repr(losses)


def interrupted(case: str, folder: Path) -> str:
    """Stops after 20 steps, because the last rank is asked to; leaves from.safetensors to go on from."""
    states: list[Any] = []
    seen: list[int] = []
    last = distributed.rank() == distributed.num_ranks() - 1
    try:
        train(
            "elbo",
            on_step=lambda state: seen.append(state.step),
            on_checkpoint=lambda state: states.append(saved_by(state)),
            should_stop=lambda: last and len(seen) >= 19 + (distributed.num_ranks() == 1),
        )
    except TrainingStopped as stopped:
        if distributed.is_writer():
            save_file(states[-1][0], folder / "from.safetensors")
            (folder / "from.json").write_text(json.dumps(states[-1][1]))
        return f"stopped at {stopped.step}"
    return "ended"


def not_finite(case: str, folder: Path) -> str:
    """The images of the last rank's part of step 5 are not finite."""
    compiled = case == "not finite, compiled"
    count = [0]

    def objective(model: Any, guide: Any, x: Tensor, *, beta: Any) -> Tensor:
        count[0] += 1
        bad = distributed.rank() == distributed.num_ranks() - 1 and count[0] == 5
        return (unwrap(model).__self__.posterior(x).mean * (math.nan if bad else 1.0)).square().mean()

    def poison(state: Any) -> None:
        if compiled and state.step == 4:
            next(state.program.parameters()).data.fill_(math.nan)

    try:
        train("elbo", on_step=poison, **({"compile": True} if compiled else {"objective": objective}))
    except ArithmeticError as error:
        return str(error)
    return "ended"


def dies(case: str, folder: Path) -> str:
    """The last rank is killed in the middle of training."""

    def kill(state: Any) -> None:
        if state.step == 5 and distributed.rank() == distributed.num_ranks() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train("elbo", on_step=kill)
    return "ended"


def differs(case: str, folder: Path) -> str:
    """The last rank's weights move by themselves."""

    def move(state: Any) -> None:
        if state.step == 2 and distributed.rank() == distributed.num_ranks() - 1:
            next(state.program.parameters()).data.flatten()[0] += 1e-9

    train("elbo", on_step=move)
    return "ended"


def refused(case: str, folder: Path) -> str:
    """An objective with dropout, noise that no site draws."""

    def objective(model: Any, guide: Any, x: Tensor, *, beta: Any) -> Tensor:
        return torch.nn.functional.dropout(unwrap(model).__self__.posterior(x).mean, 0.5).mean()

    train("elbo", objective=objective)
    return "ended"


def exchanges(case: str, folder: Path) -> str:
    """What ``distributed`` offers, once each."""
    rank, num_ranks = distributed.rank(), distributed.num_ranks()
    total = torch.tensor([1.0 + rank])
    distributed.sum_over_ranks(total)
    rows = torch.arange(7)[rank::num_ranks]
    values = torch.tensor([-0.0, 0.1, math.nan, math.inf, -math.inf, 1e-310, 3.0], dtype=torch.double)
    table = distributed.gather_rows(values[rows][:, None], 7, rows)[:, 0]
    same = torch.equal(table.view(torch.int64), values.view(torch.int64))
    nothing = distributed.gather_rows(values[:0], 0, rows[:0])
    return repr(
        (
            float(total),
            same,
            len(nothing),
            distributed.agree(rank == 1),
            distributed.agree(False),
            distributed.broadcast(["é", rank]),
            distributed.gather_objects(rank),
        )
    )


OTHERS: dict[str, Callable[[str, Path], str]] = {
    "interrupted": interrupted,
    "not finite": not_finite,
    "not finite, compiled": not_finite,
    "dies": dies,
    "differs": differs,
    "refused": refused,
    "exchanges": exchanges,
}


def run(rank: int, num_ranks: int, port: int, folder: Path, cases: list[str]) -> int:
    if num_ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        distributed.join("cpu")
    for case in cases:
        try:
            words = OTHERS.get(case, of_case)(case, folder)
        except (ValueError, OSError, ArithmeticError) as error:
            words = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        (folder / f"{case}.{rank}.txt").write_text(words)
    distributed.leave()
    return 0


def main() -> None:
    folder, num_ranks, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(int(num_ranks)):
        child = os.fork()
        if not child:
            status = 1
            try:
                status = run(rank, int(num_ranks), port, Path(folder), cases)
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


if __name__ == "__main__":
    main()
