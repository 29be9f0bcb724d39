"""Building a VAE from options: every combination of words, and which options may stand together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_vae import data
from ppl_vae.commands.train import train_run
from ppl_vae.parts.registry import COUPLINGS, LIKELIHOODS, NETWORKS, POSTERIOR_FLOWS, POSTERIORS, PRIORS
from ppl_vae.parts.registry import TABLES as CHOICES
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options, format_flag
from ppl_vae.runs.resolve import resolve

P, Q = len(PRIORS), len(POSTERIORS)
# Every pair of words of two tables is in one of these combinations, as the next test shows.
COMBINATIONS = [
    (network, likelihood, list(PRIORS)[(i + j) % P], list(POSTERIORS)[(i + j // P) % Q])
    for i, network in enumerate(NETWORKS)
    for j, likelihood in enumerate(LIKELIHOODS)
]
REFUSED_PAIRS = {(prior, "delta") for prior in PRIORS if prior != "standard-normal"}
FEW_COMPONENTS = {"prior_components": 3}
FEW_COUPLINGS: dict[str, Any] = {"prior_layers": 2, "prior_hidden": (4,)}
SMALL_PRIORS = {"mixture": FEW_COMPONENTS, "vamp": FEW_COMPONENTS, "flow": FEW_COUPLINGS}


def small(**words: Any) -> Options:
    """Three latents, narrow networks, and a small prior."""
    sizes = {"hidden": (5, 4), "latent_dim": 3} | SMALL_PRIORS.get(words.get("prior", ""), {})
    return Options(**(sizes | words))


@pytest.mark.parametrize(("network", "likelihood", "prior", "posterior"), COMBINATIONS)
def test_a_combination_of_words_builds(network: str, likelihood: str, prior: str, posterior: str) -> None:
    if (prior, posterior) in REFUSED_PAIRS:
        with pytest.raises(ValueError, match="--posterior delta: expected --prior standard-normal"):
            build_vae(small(network=network, likelihood=likelihood, prior=prior, posterior=posterior), (1, 2, 3))
        return
    asked = small(network=network, likelihood=likelihood, prior=prior, posterior=posterior)
    vae = build_vae(asked, (1, 2, 3))
    assert vae.likelihood.event_shape == (1, 2, 3)
    assert vae.prior().event_shape == vae.posterior(torch.rand(5, 1, 2, 3)).event_shape == (3,)


FLOWS = [{"prior": "flow", "prior_flow": word} for word in COUPLINGS]
FLOWS += [{"posterior": "flow", "posterior_flow": word, "prior": "vamp"} for word in POSTERIOR_FLOWS]
LAYERED = [
    {"upper_latents": upper, "upper_hidden": (6, 5), "inference": inference, "decoder_input": seen, "prior": prior}
    for upper in ((2,), (4, 2))
    for inference in ("top-down", "bottom-up")
    for seen in ("bottom", "all")
    for prior in PRIORS
    if prior != "vamp"
]


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("words", FLOWS + LAYERED, ids=lambda words: " ".join(map(str, words.values())))
def test_flows_and_several_layers_build_on_the_cpu_and_the_meta_device(words: dict[str, Any], place: str) -> None:
    with torch.device(place):
        vae = build_vae(small(**words), (1, 2, 3))
    assert {w.device.type for w in vae.parameters()} == {place}
    assert tuple(vae.likelihood.event_shape) == (1, 2, 3)


@pytest.mark.parametrize("transform", ["none", "logit"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_builds_on_the_meta_device(likelihood: str, transform: str) -> None:
    """On the meta device, where shapes are counted before anything is trained."""
    asked = Options(likelihood=likelihood, transform=transform, hidden=(5,), latent_dim=3)
    try:
        build_vae(asked, (1, 2, 3))
    except ValueError:
        return
    with torch.device("meta"):
        assert build_vae(asked, (1, 2, 3)).likelihood.event_shape == (1, 2, 3)


@pytest.mark.parametrize(("option", "word"), [(option, word) for option, table in CHOICES.items() for word in table])
def test_every_word_of_the_registry_names_something_that_can_be_imported(option: str, word: str) -> None:
    part = CHOICES[option][word]
    assert part.load() is not None
    assert set(part.arguments(Options())) == set(part.options.values())


DELTA = {"posterior": "delta"}
CONFLICTS = {
    "an analytic KL of a flow": ({"kl": "analytic", "prior": "flow"}, "--kl analytic: expected .*, got flow$"),
    "an analytic KL, bottom-up": (
        {"upper_latents": (3,), "inference": "bottom-up", "kl": "analytic", "prior": "standard-normal"},
        "--inference bottom-up: expected a sampled KL",
    ),
    "an analytic KL of log-weights": ({"objective": "stl", "kl": "analytic"}, "--kl: expected .*, got stl$"),
    "an analytic KL of free bits": ({"objective": "free-bits", "kl": "analytic"}, "--kl: expected .*, got free-bits$"),
    "free bits of a full guide": ({"objective": "free-bits", "posterior": "full"}, "free-bits: expected .*, got full$"),
    "free bits without their objective": ({"free_bits": 0.5}, "--free-bits: expected --objective free-bits, got stl$"),
    "delta, beta 1": (DELTA, "--posterior delta: expected --beta 0 .*, got --beta 1$"),
    "delta, beta 0.5": (DELTA | {"beta": 0.5}, r"--posterior delta: expected --beta 0 .*, got --beta 0\.5$"),
    "delta, a flow": (DELTA | {"beta": 0.0, "prior": "flow", "objective": "elbo"}, "delta: expected .*, got flow"),
    "delta, free bits": (DELTA | {"beta": 0.0, "objective": "free-bits"}, "free-bits: expected .*, got delta$"),
    "delta, log-weights": (DELTA | {"beta": 0.0, "objective": "dreg"}, "dreg: expected .*, got delta$"),
    "a flow of one latent": ({"prior": "flow", "latent_dim": 1}, "flow: expected at least 2, .*, got 1$"),
    "a flow of one latent on top": ({"prior": "flow", "upper_latents": (3, 1)}, "expected at least 2, .*, got 1$"),
    "several layers, another posterior": (
        {"prior": "standard-normal", "upper_latents": (3,), "posterior": "full"},
        "--upper-latents: expected --posterior diagonal at every layer, got full$",
    ),
    "several layers, a VampPrior": ({"upper_latents": (3,), "prior": "vamp"}, "-latents: expected .*, got vamp "),
}

# Options that belong to some words of another option: a value that is not the default, the other option, a word
# without this option, and the words with it.
OWN_OPTIONS: dict[str, tuple[Any, str, str, str]] = {
    "prior_components": (7, "prior", "flow", "mixture or vamp"),
    "prior_flow": ("spline", "prior", "mixture", "flow"),
    "prior_layers": (3, "prior", "standard-normal", "flow"),
    "prior_hidden": ((9,), "prior", "vamp", "flow"),
    "posterior_flow": ("spline", "posterior", "diagonal", "flow"),
    "posterior_layers": (4, "posterior", "full", "flow"),
    "posterior_hidden": ((6,), "posterior", "diagonal", "flow"),
    "scale_map": ("exp", "posterior", "delta", "diagonal or full or flow"),
    "decay_start": (0.3, "schedule", "stages", "cosine"),
    "free_bits": (0.7, "objective", "iwae", "free-bits"),
}
LAYER_OPTIONS = {"upper_hidden": (4,), "inference": "bottom-up", "decoder_input": "all"}

CONFLICTS |= {
    f"{name} of another {of}": (
        {name: value, of: word} | ({"beta": 0.0, "objective": "elbo"} if word == "delta" else {}),
        f"{format_flag(name)}: expected {format_flag(of)} {words}, got {word}$",
    )
    for name, (value, of, word, words) in OWN_OPTIONS.items()
}
CONFLICTS |= {
    f"{name} of one layer": (
        {name: value},
        f"{format_flag(name)}: expected it together with --upper-latents, got it alone$",
    )
    for name, value in LAYER_OPTIONS.items()
}


@pytest.mark.parametrize("name", [*OWN_OPTIONS, *LAYER_OPTIONS])
def test_an_option_is_accepted_with_its_own_part(name: str) -> None:
    if name in LAYER_OPTIONS:
        asked = {name: LAYER_OPTIONS[name], "upper_latents": (2,), "prior": "standard-normal"}
    else:
        value, of, _, words = OWN_OPTIONS[name]
        asked = {name: value, of: words.split(" or ")[0]}
    build_vae(Options(**({"hidden": (5,)} | asked)), (1, 2, 3))


@pytest.mark.thorough
@pytest.mark.parametrize("words", CONFLICTS)
def test_conflicting_options_are_refused_and_leave_no_folder(tmp_path: Path, words: str) -> None:
    asked, expected = CONFLICTS[words]
    with pytest.raises(ValueError, match=expected):
        train_run(Options(**asked), str(tmp_path / "run"), say=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"posterior": "delta", "beta": 0.0},
        {"objective": "free-bits", "free_bits": 0.5},
        {"objective": "free-bits", "beta": 4.0, "scale_map": "exp"},
    ],
    ids=str,
)
def test_consistent_options_are_kept(asked: dict[str, Any]) -> None:
    resolved = resolve(Options(**asked), data.load("mnist"))
    assert {name: getattr(resolved, name) for name in asked} == asked
