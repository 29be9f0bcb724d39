"""Options to parts: the one place where a word becomes an object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae import likelihoods, networks, objectives, posteriors, priors, runs
from ppl_vae.conditional import Conditional
from ppl_vae.options import Options, from_json
from ppl_vae.vae import VAE

LIKELIHOODS: dict[str, Callable[..., Any]] = {"bernoulli": likelihoods.Bernoulli}
NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": networks.MLP, "gated": networks.GatedMLP}
PRIORS: dict[str, Callable[..., Any]] = {"standard-normal": priors.StandardNormal}
POSTERIORS: dict[str, Callable[..., Any]] = {"diagonal": posteriors.DiagonalNormal}
KLS: dict[str, type[ELBO]] = {"sampled": Trace_ELBO, "analytic": TraceMeanField_ELBO}


def _elbo(options: Options) -> Callable[..., Tensor]:
    return partial(objectives.elbo, estimator=KLS[options.kl], num_particles=options.num_particles)


OBJECTIVES: dict[str, Callable[[Options], Callable[..., Tensor]]] = {"elbo": _elbo}


def vae(options: Options, event_shape: Sequence[int]) -> VAE:
    """The VAE that the options describe, for images of that shape, with fresh weights from torch's global generator."""
    network = NETWORKS[options.network]
    likelihood = LIKELIHOODS[options.likelihood](event_shape)
    posterior = POSTERIORS[options.posterior](options.latent_dim)
    return VAE(
        PRIORS[options.prior](options.latent_dim),
        Conditional(network(options.latent_dim, likelihood.num_features, hidden=options.hidden[::-1]), likelihood),
        Conditional(network(event_shape, posterior.num_features, hidden=options.hidden), posterior),
    )


def start_from_marginals(vae: VAE, x: Tensor) -> None:
    """Sets the decoder's output bias so that training starts from the pixels' marginals.

    Args:
        x: (N, *E) training images as the model sees them, or their expectation.

    Source: Burda et al. 2016, arXiv 1509.00519, released code (output bias from the training pixels' means).
    """
    decoder: Any = vae.likelihood
    with torch.no_grad():
        decoder.net.output.bias.copy_(decoder.family.marginal_features(x))


def objective(options: Options) -> Callable[..., Tensor]:
    """(model, guide, x, *, beta) -> loss, nats an image."""
    return OBJECTIVES[options.objective](options)


def device(word: str) -> torch.device:
    """Raises ValueError where there is no such device here, or one whose random numbers are not kept for resuming."""
    try:
        found = torch.device(word)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        choices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise ValueError(f"--device: expected a device of this machine ({', '.join(choices)}), got {word!r}") from None
    return found


def read_config(run_dir: Path) -> tuple[Options, dict[str, Any]]:
    """A run's options, and what its data was: event_shape (a tuple) and sha256.

    Raises:
        ValueError: the folder is no run, or its config is damaged.
    """
    path = run_dir / runs.CONFIG
    config = runs.read_json(path)
    try:
        data = config["data"]
        shape = data["event_shape"]
        if not (shape and all(type(size) is int and size > 0 for size in shape)):
            raise ValueError(f"event_shape: expected whole numbers, got {shape}")
        options = from_json(config["options"])
        if options.binarization is None or options.warmup_epochs is None:
            raise ValueError("expected binarization and warmup_epochs as they were resolved, got null")
        return options, {"sha256": data["sha256"], "event_shape": tuple(shape)}
    except KeyError as error:
        raise ValueError(f"{path}: damaged: missing {error}") from None
    except TypeError:
        raise ValueError(f"{path}: damaged: expected the objects options and data") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_weights(vae: VAE, path: Path, weights: dict[str, Tensor]) -> None:
    """Puts weights into a VAE of the same architecture. Raises ValueError where they do not fit."""
    try:
        vae.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: the weights do not fit the run's config: {first}") from None


def load(run_dir: str | Path) -> VAE:
    """The trained VAE of a run folder, on the CPU, in evaluation mode.

    Raises:
        ValueError: the folder is no run, has no weights yet, or is damaged.
    """
    folder = Path(run_dir)
    options, seen = read_config(folder)
    model = vae(options, seen["event_shape"])
    weights, _ = runs.load_tensors(folder / runs.MODEL)
    load_weights(model, folder / runs.MODEL, weights)
    return model.eval()
