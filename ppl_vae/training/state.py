"""The state of a training, from which a run goes on exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppl_vae.vae import VAE


class TrainingState:
    """All that the next step depends on: weights, optimizer, random numbers, the place in the epoch, the best so far.

    Adam is torch's, one optimizer over all parameters, fused. The noise of Pyro's sites and of the data comes from
    torch's global generator; the order of the images depends on (seed, epoch) alone. ``averages`` are the exponential
    moving averages of the parameters, where they are kept. ``best_validation`` is the highest validation ELBO (or
    L_S) so far, or, where the guide is deterministic, the highest validation reconstruction, nats an image.
    """

    def __init__(self, vae: VAE, *, device: torch.device, averaged: bool = False) -> None:
        self.vae = vae
        self.device = device
        self.optimizer = torch.optim.Adam(vae.parameters(), fused=True)
        self.averages = {name: w.detach().clone() for name, w in vae.named_parameters()} if averaged else {}
        self.step = 0
        self.epoch_loss = 0.0  # summed over the images of this epoch so far, nats
        self.epoch_images = 0  # how many those are: without those of the steps that were left out
        self.skipped = 0  # steps that were left out, of all
        self.seconds = 0.0  # of training and validation, over all sessions
        self.best_validation = -math.inf
        self.best_step = 0
        self.best_weights: dict[str, Tensor] = {}

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """The averages in the place of the weights, where there are averages."""
        weights = {name: w.detach().clone() for name, w in self.vae.named_parameters()} if self.averages else {}
        with torch.no_grad():
            self._put(self.averages)
            try:
                yield
            finally:
                self._put(weights)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.vae.get_parameter(name).copy_(value)

    def keep_weights(self) -> None:
        """Remembers these weights as the best."""
        self.best_step = self.step
        self.best_weights = {name: w.detach().clone() for name, w in self.vae.state_dict().items()}

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything, as named tensors (which share memory with this state) and a JSON object."""
        tensors = {f"weights/{name}": w for name, w in self.vae.state_dict().items()}
        tensors |= {f"best/{name}": w for name, w in self.best_weights.items()}
        names = [name for name, _ in self.vae.named_parameters()]
        moments_of = self.optimizer.state_dict()["state"]
        for index, moments in moments_of.items():
            tensors |= {f"adam/{names[index]}/{key}": value for key, value in moments.items()}
        tensors |= {f"average/{name}": w for name, w in self.averages.items()}
        tensors |= {"rng/torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        scalars = {
            "step": self.step,
            "trained": [names[index] for index in moments_of],
            "epoch_loss": self.epoch_loss,
            "epoch_images": self.epoch_images,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "best_validation": self.best_validation if math.isfinite(self.best_validation) else None,
            "best_step": self.best_step,
        }
        return tensors, scalars

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Back from ``to_tensors``, for a VAE of the same architecture.

        Raises:
            ValueError: something is missing, or does not fit the VAE.
        """
        try:
            self.vae.load_state_dict(_under("weights/", tensors))
            for name, average in self.averages.items():
                average.copy_(tensors[f"average/{name}"])
            moments = {}
            for index, (name, parameter) in enumerate(self.vae.named_parameters()):
                if name not in scalars["trained"]:  # it never had a gradient, so Adam holds nothing of it
                    continue
                moments[index] = {"step": tensors[f"adam/{name}/step"].clone()} | {
                    key: _laid_out_as(parameter, tensors[f"adam/{name}/{key}"], f"the optimizer's moments of {name}")
                    for key in ("exp_avg", "exp_avg_sq")
                }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            torch.set_rng_state(tensors["rng/torch"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
            self.best_weights = {name: w.to(self.device) for name, w in _under("best/", tensors).items()}
            self.step, self.epoch_loss = scalars["step"], scalars["epoch_loss"]
            self.epoch_images, self.skipped = scalars.get("epoch_images", 0), scalars.get("skipped", 0)
            self.seconds, self.best_step = scalars["seconds"], scalars["best_step"]
            best = scalars["best_elbo" if "best_elbo" in scalars else "best_validation"]  # the first is of old files
            self.best_validation = -math.inf if best is None else best
        except KeyError as error:
            raise ValueError(f"damaged: no {error} in it") from None
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"damaged: {str(error).splitlines()[-1].strip()}") from None


def _laid_out_as(parameter: Tensor, tensor: Tensor, words: str) -> Tensor:
    """A copy with the parameter's strides: fused Adam takes its moments place by place, whatever their layout says."""
    if tensor.shape != parameter.shape:
        raise ValueError(f"damaged: {words} have the wrong shape")
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
