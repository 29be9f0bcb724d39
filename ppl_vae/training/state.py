"""The state of a training, from which it continues exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppl_vae.protocols import Program

_SCALARS = ("step", "epoch_loss", "epoch_images", "skipped", "seconds", "best_step")


class TrainingState:
    """Everything on which the next step depends: weights, optimizer, random numbers, place in the epoch, best weights.

    The noise of Pyro's sites and of the data comes from torch's global generator; the order of the images depends on
    the seed and the epoch alone.

    Args:
        program: What is trained, on its device.
        optimizer: Over all of its parameters; by default torch's fused Adam.
        averaged: Whether exponential moving averages of the parameters are kept.

    Attributes:
        step: Steps so far.
        epoch_loss: The loss summed over the images of this epoch so far, nats.
        epoch_images: The number of those images, without those of skipped steps.
        skipped: Skipped steps so far.
        seconds: Time of training and validation, over all sessions.
        averages: The averages by name, or nothing.
        best_validation: The highest validation ELBO (or L_S, or reconstruction) so far, nats per image.
        best_step: The step of ``best_weights``, the weights with that validation.
    """

    def __init__(
        self, program: Program, optimizer: torch.optim.Optimizer | None = None, *, averaged: bool = False
    ) -> None:
        self.program = program
        self.device = next(program.parameters()).device
        self.optimizer = torch.optim.Adam(program.parameters(), fused=True) if optimizer is None else optimizer
        self.averages = {name: w.detach().clone() for name, w in program.named_parameters()} if averaged else {}
        self.step = self.epoch_images = self.skipped = self.best_step = 0
        self.epoch_loss = self.seconds = 0.0
        self.best_validation = -math.inf
        self.best_weights: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        best = f", best validation {self.best_validation:.2f} nats per image at step {self.best_step:,}"
        return f"TrainingState: {self.step:,} steps in {self.seconds:.1f} s{best * math.isfinite(self.best_validation)}"

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Replace the weights by their averages, if there are any, for the length of a block."""
        weights = {name: w.detach().clone() for name, w in self.program.named_parameters()} if self.averages else {}
        with torch.no_grad():
            self._set_weights(self.averages)
            try:
                yield
            finally:
                self._set_weights(weights)

    def _set_weights(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.program.get_parameter(name).copy_(value)

    def keep_weights(self) -> None:
        """Remember the present weights as the best."""
        self.best_step = self.step
        self.best_weights = {name: w.detach().clone() for name, w in self.program.state_dict().items()}

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything as named tensors, which share memory with this state, and a JSON object."""
        tensors = {f"weights/{name}": w for name, w in self.program.state_dict().items()}
        tensors |= {f"best/{name}": w for name, w in self.best_weights.items()}
        names = [name for name, _ in self.program.named_parameters()]
        states = self.optimizer.state_dict()["state"]
        for index, state in states.items():  # "adam" stands for whichever optimizer: run folders have this name
            tensors |= {f"adam/{names[index]}/{key}": value for key, value in state.items()}
        tensors |= {f"average/{name}": w for name, w in self.averages.items()}
        tensors |= {"rng/torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        best = self.best_validation if math.isfinite(self.best_validation) else None
        scalars = {name: getattr(self, name) for name in _SCALARS}
        return tensors, scalars | {"trained": [names[index] for index in states], "best_validation": best}

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Restore what ``to_tensors`` returned, for a program of the same architecture; a ValueError refuses others."""
        try:
            self.program.load_state_dict(_remove_prefix("weights/", tensors))
            for name, average in self.averages.items():
                average.copy_(tensors[f"average/{name}"])
            self._restore_optimizer(tensors, scalars["trained"])
            torch.set_rng_state(tensors["rng/torch"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
            self.best_weights = {name: w.to(self.device) for name, w in _remove_prefix("best/", tensors).items()}
            for name in _SCALARS:
                setattr(self, name, scalars[name])
            best = scalars["best_validation"]
            self.best_validation = -math.inf if best is None else best
        except KeyError as error:
            raise ValueError(f"damaged: no {error} in it") from None
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"damaged: {str(error).splitlines()[-1].strip()}") from None

    def _restore_optimizer(self, tensors: dict[str, Tensor], trained: list[str]) -> None:
        """Restore the optimizer's tensors of the parameters that have had a gradient; of others it holds nothing."""
        parameters = dict(self.program.named_parameters())
        saved = {name: _remove_prefix(f"adam/{name}/", tensors) for name in trained}
        keys = {key for state in saved.values() for key in state}
        if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW) and trained:
            keys |= {"step", "exp_avg", "exp_avg_sq"}
        states = {}
        for index, (name, parameter) in enumerate(parameters.items()):
            if name in saved:
                missing = [key for key in sorted(keys) if key not in saved[name]]
                if missing:
                    raise KeyError(f"adam/{name}/{missing[0]}")
                states[index] = {key: _copy_state(parameter, value, name) for key, value in saved[name].items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _copy_state(parameter: Tensor, tensor: Tensor, name: str) -> Tensor:
    """Copy a tensor of the optimizer with the parameter's strides: fused Adam ignores the layout of its moments."""
    if not tensor.dim():  # the number of steps
        return tensor.clone()
    if tensor.shape != parameter.shape:
        raise ValueError(f"damaged: the optimizer's state of {name} has the wrong shape")
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _remove_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
