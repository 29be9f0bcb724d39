"""What Python callers give: NumPy's numbers count as Python's, and what cannot be used is refused in one line."""

from __future__ import annotations

import json
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

from ppl_vae import VAE, Conditional, importance, log_evidence
from ppl_vae.evidence import ais, guide_calibration, missing
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.refinement import measure_gaps, refine_proposal
from ppl_vae.parts import flows, likelihoods, networks, posteriors, priors
from ppl_vae.runs.options import Options
from ppl_vae.runs.results import to_json

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


def calls(number: Callable[[int], Any]) -> dict[str, Callable[[VAE], Any]]:
    """Public functions with counts, each of which is made by ``number``."""
    n = number

    def annealed(vae: VAE) -> Any:
        betas = ais.temperatures(n(3))
        pilot = ais.pilot(vae, IMAGES, betas=betas, num_leapfrogs=n(1), num_chains=n(2))
        return ais.lower(vae, IMAGES, pilot, num_chains=n(2)).log_w

    return {
        "log_evidence": lambda v: log_evidence(v.model, v.guide, IMAGES, num_particles=n(9), chunk=n(4)),
        "importance": lambda v: importance(v.model, v.guide, IMAGES, num_particles=n(9)).elbo,
        "evaluate": lambda v: evaluate(v, IMAGES, num_particles=n(9), seed=n(7)).log_evidence,
        "iwae": lambda v: per_image.iwae(v.model, v.guide, IMAGES, num_particles=n(3)).detach(),
        "dreg": lambda v: per_image.dreg(v.model, v.guide, IMAGES, num_particles=n(3)).detach(),
        "ais": annealed,
        "simulate": lambda v: ais.simulate(v, n(5))[0],
        "refined": lambda v: refine_proposal(v, IMAGES, steps=n(2), num_particles=n(2)).h,
        "impute": lambda v: (
            missing.impute(
                missing.Observed(v, rounds=n(2), num_fillings=n(3)), IMAGES[:2], num_particles=n(4), num_draws=n(2)
            ).draws
        ),
        "ranks": lambda v: guide_calibration.compute_ranks(v, num_simulations=n(6), num_draws=n(5)).latents,
        "gaps": lambda v: measure_gaps(v, IMAGES[:3], torch.zeros(3), steps=n(2), num_particles=n(2)).elbo,
    }


@pytest.mark.parametrize("name", calls(int))
@pytest.mark.parametrize("number", [np.int64, np.uint8])
def test_a_function_gives_the_same_for_numpys_counts(name: str, number: Callable[[int], Any]) -> None:
    vae = small_vae().eval()
    found = []
    for make in (int, number):
        torch.manual_seed(3)
        found.append(calls(make)[name](vae))
    assert torch.equal(*found)


PARTS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "MLP": lambda n, widths: networks.MLP(n(16), n(4), hidden=widths),
    "GatedMLP": lambda n, widths: networks.GatedMLP(n(16), n(4), hidden=widths),
    "ConvEncoder": lambda n, widths: networks.ConvEncoder((n(1), n(8), n(8)), n(4), channels=widths, hidden=widths),
    "ConvDecoder": lambda n, widths: networks.ConvDecoder(
        n(3), (n(1), n(8), n(8)), n(64), channels=widths, hidden=widths
    ),
    "coupling": lambda n, widths: flows.affine_coupling(n(4), hidden=widths),
    "iaf": lambda n, widths: posteriors.inverse_autoregressive_flow(
        n(4), context_dim=n(3), num_layers=n(2), hidden=widths
    ),
    "spline": lambda n, widths: posteriors.spline_flow(n(4), context_dim=n(3), num_layers=n(2), hidden=widths),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("widths", [8, np.int64(8), [8], np.array([8])], ids=repr)
def test_a_network_takes_one_width_or_several_of_any_kind(name: str, widths: Any) -> None:
    found, expected = PARTS[name](np.int64, widths).state_dict(), PARTS[name](int, (8,)).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_a_width_that_is_no_whole_number_is_refused() -> None:
    for hidden in (2.5, "8", [8, 0], [True], None):
        with pytest.raises(ValueError, match="hidden: expected"):
            networks.MLP(3, 4, hidden=hidden)  # type: ignore[arg-type]


def test_options_hold_plain_python_numbers() -> None:
    given = Options(
        latent_dim=np.int64(3), beta=np.float32(0.5), hidden=np.array([8, 4]), channels=[np.int32(2)], prior_hidden=6
    )
    plain = Options(latent_dim=3, beta=0.5, hidden=(8, 4), channels=(2,), prior_hidden=(6,))
    assert given == plain
    assert json.loads(json.dumps(to_json(given))) == to_json(plain)


@pytest.mark.parametrize("value", [2.5, np.float64(2), np.bool_(True), np.array([[3]]), "3", None], ids=repr)
def test_options_refuse_what_is_no_whole_number(value: Any) -> None:
    for name in ("latent_dim", "hidden"):
        if value is not None or name == "latent_dim":
            with pytest.raises(ValueError, match="expected"):
                Options(**{name: value})


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
    [list(IMAGES), IMAGES.tolist(), None, np.array(["a"]), np.array(3.0)],
    ids=["tensors", "list", "none", "strings", "scalar"],
)
@pytest.mark.parametrize("name", ["data", "validation"])
def test_images_that_are_no_tensor_are_refused_in_one_line(name: str, train: Any) -> None:
    if name == "validation" and train is None:
        return
    images = {"data": IMAGES, "validation": None} | {name: train}
    with pytest.raises(ValueError, match=rf"^{name}: expected one tensor, array or Dataset") as caught:
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
    "image-shaped": (lambda layer, z: layer(z).unflatten(-1, E), "net: expected one tensor of 16 features .*, got"),
    "several": (lambda layer, z: (layer(z), layer(z)), "net: expected one tensor of 16 features.*got tuple"),
    "too few": (lambda layer, z: layer(z)[..., :5], "net: expected one tensor of 16 features .*, got"),
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


def test_the_cure_for_an_image_shaped_output_works() -> None:
    vae = small_vae(decoder=Decoder(lambda layer, z: layer(z).unflatten(-1, E).flatten(-3)))
    assert log_evidence(vae.model, vae.guide, IMAGES, num_particles=3).shape == (21,)


@pytest.mark.parametrize("part", ["likelihood", "posterior"])
def test_a_network_in_the_place_of_a_distribution_is_refused_in_one_line(part: str) -> None:
    vae = small_vae()
    setattr(vae, part, getattr(vae, part).net)
    with pytest.raises(ValueError, match=rf"^{part}: expected a function that returns a distribution") as caught:
        log_evidence(vae.model, vae.guide, IMAGES, num_particles=3)
    assert len(str(caught.value).splitlines()) == 1


def test_pixels_that_are_no_event_are_refused_with_the_cure() -> None:
    vae = VAE(
        priors.StandardNormal(L),
        lambda z: pyro.distributions.Bernoulli(logits=torch.zeros(*z.shape[:-1], *E)),
        small_vae().posterior,
    )
    with pytest.raises(ValueError, match=r"\.to_event\(3\)"):
        fit(vae, IMAGES, epochs=1)


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


def test_a_last_batch_of_one_image_trains_where_a_channel_has_several_pixels() -> None:
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2 * L))
    assert fit(small_vae(encoder=encoder), IMAGES, epochs=1, batch_size=20).step == 2


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


class HoldsAutoguide(torch.nn.Module):
    """A program whose guide calls an autoguide, which it holds as one of several kinds of attribute."""

    def __init__(self, place: str) -> None:
        super().__init__()
        vae = small_vae()
        autoguide = AutoNormal(vae.model)
        self.place = place
        if place == "unregistered vae":
            self.vae = (vae,)
        else:
            self.vae = torch.nn.ModuleList([vae])
        if place == "guide method":
            self.__dict__["guide"] = autoguide.forward
        elif place == "list":
            self.parts = [autoguide]
        else:
            self.parts = torch.nn.ModuleList([autoguide])

    def model(self, x: torch.Tensor) -> None:
        self.vae[0].model(x)

    def guide(self, x: torch.Tensor) -> None:
        self.parts[0](x)


@pytest.mark.parametrize("batch_size", [100, 20])
@pytest.mark.parametrize("place", ["submodule", "list", "guide method", "unregistered vae"])
def test_a_program_that_holds_an_autoguide_is_refused_before_training(place: str, batch_size: int) -> None:
    pyro.clear_param_store()
    program = HoldsAutoguide(place)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    with pytest.raises(ValueError, match=r"guide: expected .* got AutoNormal.*autoguide.*encoder") as caught:
        fit(program, IMAGES, epochs=1, batch_size=batch_size)
    assert len(str(caught.value).splitlines()) == 1
    assert program.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
