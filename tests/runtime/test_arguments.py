"""What Python callers give: NumPy's numbers count as Python's, and what cannot be used is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import per_image
import pyro
import pytest
import torch
from fitting import fit
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoStructured
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae import VAE, Conditional, log_evidence
from ppl_vae.parts import likelihoods, networks, posteriors, priors

E, L = (1, 4, 4), 2


def small_vae(*, decoder: nn.Module | None = None, encoder: nn.Module | None = None) -> VAE:
    torch.manual_seed(0)
    decoder = decoder or networks.MLP(L, 16, hidden=(8,))
    encoder = encoder or networks.MLP(E, 2 * L, hidden=(8,))
    p_x_given_z = Conditional(decoder, likelihoods.Bernoulli(E))
    return VAE(priors.StandardNormal(L), p_x_given_z, Conditional(encoder, posteriors.DiagonalNormal(L)))


IMAGES = torch.bernoulli(torch.full((21, *E), 0.5), generator=torch.Generator().manual_seed(0))


def weights_after(**arguments: Any) -> list[Tensor]:
    vae = small_vae()
    fit(vae, IMAGES, IMAGES[:5], **{"epochs": 2} | arguments)
    return [w.detach() for w in vae.parameters()]


# --- NumPy's numbers ---

FIT_ARGUMENTS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 6,
    "learning_rate": 0.25,  # floats that single precision holds exactly
    "beta": 0.5,
    "warmup_epochs": 1,
    "clip_norm": 8.0,
    "skip_norm": 512.0,
    "average_decay": 0.5,
    "validation_particles": 2,
    "seed": 2**33,
    "keep_last": True,
    "compile": False,
    "stream": False,
}


def as_numpy(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [np.bool_(value)]
    if isinstance(value, float):
        return [np.float32(value), np.float64(value)]
    return [kind(value) for kind in (np.int64, np.uint8) if value <= np.iinfo(kind).max]


@pytest.mark.parametrize("name", FIT_ARGUMENTS)
def test_a_training_by_numpys_numbers_has_the_weights_of_one_by_pythons(name: str) -> None:
    expected = weights_after(**{name: FIT_ARGUMENTS[name]})
    for value in as_numpy(FIT_ARGUMENTS[name]):
        assert all(map(torch.equal, weights_after(**{name: value}), expected)), repr(value)


# --- Images ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.bool_])
def test_an_array_trains_as_its_tensor_does(dtype: Any) -> None:
    expected = weights_after()
    array = IMAGES.numpy().astype(dtype)
    array.flags.writeable = False  # as of a mapped file
    vae = small_vae()
    fit(vae, array, array[:5], epochs=2)
    assert all(map(torch.equal, vae.parameters(), expected))


@pytest.mark.parametrize(
    "train",
    [DataLoader(IMAGES), TensorDataset(IMAGES), list(IMAGES), IMAGES.tolist(), None, np.array(["a"]), np.array(3.0)],
    ids=["loader", "dataset", "tensors", "list", "none", "strings", "scalar"],
)
@pytest.mark.parametrize("name", ["data", "validation"])
def test_images_that_are_no_tensor_are_refused_in_one_line(name: str, train: Any) -> None:
    if name == "validation" and train is None:
        return
    images = {"data": IMAGES, "validation": None} | {name: train}
    with pytest.raises(ValueError, match=rf"^{name}: expected one tensor or NumPy array") as caught:
        fit(small_vae(), images["data"], images["validation"], epochs=1)
    assert len(str(caught.value).splitlines()) == 1


# --- Networks ---


class Decoder(nn.Module):
    """z -> features, and what ``last`` makes of both."""

    def __init__(self, last: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.output, self.last = nn.Linear(L, 16), last

    def forward(self, z: Tensor) -> Any:
        return self.last(self.output, z)


WRONG_DECODERS: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "particles lost": (lambda layer, z: layer(z.view(-1, L)), r"likelihood: expected batch shape \(3, 21\).*view"),
    "image-shaped": (
        lambda layer, z: layer(z).unflatten(-1, E),
        "net: expected one tensor of 16 features for Bernoulli, got",
    ),
    "several": (lambda layer, z: (layer(z), layer(z)), "net: expected one tensor of 16 features.*got tuple"),
    "too few": (lambda layer, z: layer(z)[..., :5], "net: expected one tensor of 16 features for Bernoulli, got"),
}


@pytest.mark.parametrize("name", WRONG_DECODERS)
def test_a_decoder_of_another_shape_is_refused_in_one_line(name: str) -> None:
    last, message = WRONG_DECODERS[name]
    for use in (
        lambda vae: fit(vae, IMAGES, epochs=1, objective=partial(per_image.iwae, num_particles=3)),
        lambda vae: log_evidence(vae.model, vae.guide, IMAGES, num_particles=3),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            use(small_vae(decoder=Decoder(last)))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("part", ["likelihood", "posterior"])
def test_a_network_in_the_place_of_a_distribution_is_refused_in_one_line(part: str) -> None:
    vae = small_vae()
    setattr(vae, part, getattr(vae, part).net)
    with pytest.raises(ValueError, match=rf"^{part}: expected a function that returns a distribution") as caught:
        log_evidence(vae.model, vae.guide, IMAGES, num_particles=3)
    assert len(str(caught.value).splitlines()) == 1


# --- Batch normalization ---


@pytest.mark.parametrize(("count", "batch_size"), [(21, 20), (21, 10), (21, 1), (1, 5)])
def test_a_last_batch_of_one_image_is_refused_before_training(count: int, batch_size: int) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2 * L))
    vae = small_vae(encoder=encoder)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="batch_size: expected at least two images in the last batch"):
        fit(vae, IMAGES[:count], epochs=1, batch_size=batch_size)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


# --- Autoguides ---


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoStructured])
def test_an_autoguide_is_refused_in_one_line_that_names_the_cure(kind: Any) -> None:
    pyro.clear_param_store()
    vae = small_vae()
    guide = kind(vae.model)
    guide(IMAGES)

    def assigned() -> None:
        other = small_vae()
        other.guide = guide
        fit(other, IMAGES, epochs=1)

    for use in (
        lambda: log_evidence(vae.model, guide, IMAGES, num_particles=3),
        lambda: VAE(vae.prior, vae.likelihood, guide),
        assigned,
    ):
        with pytest.raises(ValueError, match=r"autoguide.*encoder") as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1
    pyro.clear_param_store()
