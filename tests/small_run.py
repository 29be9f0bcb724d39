"""A run on 8 x 8 images that trains in a second: bars that lie or stand, in two classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae import load, runs
from ppl_vae.commands.train import train_run
from ppl_vae.runs.options import PLAIN, Options

SMALL = Options(
    **PLAIN,
    network="mlp",
    hidden=(8,),
    latent_dim=2,
    epochs=2,
    batch_size=20,
    images=25,
    evaluation_particles=10,
    checkpoint_seconds=1e6,
)


def bars(num_images: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, 8, 8) uint8 in {0, 1}, and (N,) which of them stand."""
    generator = np.random.default_rng(seed)
    stands = generator.integers(0, 2, num_images)
    images = np.zeros((num_images, 8, 8), dtype=np.uint8)
    for image, upright, place in zip(images, stands, generator.integers(0, 7, num_images), strict=True):
        (image.T if upright else image)[place : place + 2] = 1
    return images, stands


def save_bars(path: Path) -> Path:
    """An .npz file of 100, 20 and 40 images with labels."""
    arrays = {}
    for seed, (split, count) in enumerate((("train", 100), ("valid", 20), ("test", 40))):
        arrays[split], arrays[f"{split}_labels"] = bars(count, seed=seed)
    np.savez(path, **arrays)
    return path


def silent(line: str) -> None:
    """Nothing is said."""


def train_small(folder: Path, options: Options, *, say: Callable[[str], None] = silent, draw: bool = False) -> Path:
    """Trains, without figures unless they are asked for: they take most of the time. Returns the run's folder."""
    return train_run(options, str(folder), say=say, draw=draw)


def contents(folder: Path, *, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder, apart from those of these names."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in but]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """A block that leaves every file below a folder, and the global generator, as they are."""
    before, state = contents(folder), torch.get_rng_state()
    yield
    assert contents(folder) == before
    assert torch.equal(torch.get_rng_state(), state)


def exact_log_p(folder: Path, x: np.ndarray) -> np.ndarray:
    """(N,) nats: log p of the pixels of x (N, *E) that are no NaN, by the trapezoidal rule over both latents."""
    nodes = torch.linspace(-8, 8, 321)
    z = torch.cartesian_prod(nodes, nodes)
    with torch.no_grad():
        logits = load(folder).likelihood.net(z).double()
    flat = torch.as_tensor(x).flatten(1)
    white, black = (flat == 1).double(), (flat == 0).double()  # neither of a NaN
    log_p = white @ torch.nn.functional.logsigmoid(logits).T + black @ torch.nn.functional.logsigmoid(-logits).T
    log_prior = -z.square().sum(1).double() / 2 - math.log(2 * math.pi)
    return (log_p + log_prior + 2 * math.log(0.05)).logsumexp(1).numpy()


class Killed(BaseException):
    """Nothing of the program runs after it."""


@contextmanager
def killed_at_save(number: int) -> Iterator[None]:
    """A block that is killed just after the training state was saved for the given time."""
    saves, save_tensors = [], runs.save_tensors

    def save_and_die(path, *rest):
        save_tensors(path, *rest)
        saves.append(path.name)
        if saves.count(runs.TRAINING_STATE) == number:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_tensors", save_and_die)
        with pytest.raises(Killed):
            yield


def assert_same_numbers(one: Path, other: Path) -> None:
    """Two run folders have the same weights, bit for bit, and the same evaluation but for its time."""
    weights, expected = (runs.load_tensors(folder / runs.MODEL)[0] for folder in (one, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    found, expected = (runs.read_evaluations(folder)["test"] for folder in (one, other))
    assert found | {"seconds": 0} == expected | {"seconds": 0}
