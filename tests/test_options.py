"""Options: the command line and config.json, their words, defaults and refusals."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_vae import data
from ppl_vae.commands.cli import (
    AIS_STARTS,
    TrainCommand,
    parse_certify,
    parse_compare,
    parse_encode,
    parse_evaluate,
    parse_figures,
    parse_impute,
    parse_likelihoods,
    parse_sample,
    parse_train,
)
from ppl_vae.commands.train import train as train_run
from ppl_vae.data.registry import DATASETS
from ppl_vae.evidence import ais
from ppl_vae.parts import flows
from ppl_vae.runs import build
from ppl_vae.runs.options import (
    COUPLINGS,
    DECODER_INPUTS,
    INFERENCES,
    KLS,
    LIKELIHOODS,
    NETWORKS,
    OBJECTIVES,
    PLAIN,
    POSTERIOR_FLOWS,
    POSTERIORS,
    PRIORS,
    SCALE_MAPS,
    SCHEDULES,
    TRANSFORMS,
    Options,
    default_warmup,
    flag,
    from_json,
    to_json,
)
from ppl_vae.runtime.ending import command

SCRIPTS = sorted(
    path
    for path in (Path(__file__).parent.parent / "scripts").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


def refused(capsys: pytest.CaptureFixture[str], parse: Any, words: Sequence[str]) -> str:
    """What is said of a command line that is refused: one line on stderr, exit code 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(list(words))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert (len(lines), captured.out) == (1, "")
    assert lines[0].startswith("error: ")
    return lines[0]


# --- Help ---

# Runs a script as python would, then says which of the slow packages it took.
IMPORTED = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit as done:
    code = done.code
slow = sorted({"torch", "pyro", "numpy", "matplotlib", "safetensors", "tqdm", "torchvision"} & set(sys.modules))
print("IMPORTED", code, slow)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_answers_without_torch(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(script), "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED 0 []"


@pytest.mark.parametrize("name", [spec.name for spec in fields(Options)])
def test_help_names_each_option(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_train(["--help"])
    assert f"{flag(name)} " in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_unknown_option_ends_a_script_with_code_2_and_one_line(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "run", "--sparkle"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


# --- Words ---


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (DATASETS, data.DATASETS),
        (LIKELIHOODS, build.LIKELIHOODS),
        (NETWORKS, build.NETWORKS),
        (PRIORS, build.PRIORS),
        (POSTERIORS, build.POSTERIORS),
        (SCALE_MAPS, build.SCALE_MAPS),
        (OBJECTIVES, build.OBJECTIVES),
        (SCHEDULES, build.RATES),
        (COUPLINGS, flows.COUPLINGS),
    ],
    ids=[
        "datasets",
        "likelihoods",
        "networks",
        "priors",
        "posteriors",
        "scale-maps",
        "objectives",
        "schedules",
        "couplings",
    ],
)
def test_the_words_are_those_that_build_knows(words: tuple[str, ...], parts: dict[str, Any]) -> None:
    assert list(words) == list(parts)


def test_the_words_of_kl_are_those_that_build_knows() -> None:
    assert list(KLS) == list(build.KLS)


# Every pair of words of two parts is in one of these at least, as the test after them holds.
TOGETHER_BUILT = [
    (network, likelihood, PRIORS[(i + j) % 4], POSTERIORS[(i + j // 4) % 4])
    for i, network in enumerate(NETWORKS)
    for j, likelihood in enumerate(LIKELIHOODS)
]
NO_PAIR = {(prior, "delta") for prior in PRIORS if prior != "standard-normal"}  # nothing would train the prior
PARTS_OF_ONE = (NETWORKS, LIKELIHOODS, PRIORS, POSTERIORS)
FEW_COMPONENTS = {"prior_components": 3}
FEW_COUPLINGS: dict[str, Any] = {"prior_layers": 2, "prior_hidden": (4,)}
SMALL_PRIORS = {"mixture": FEW_COMPONENTS, "vamp": FEW_COMPONENTS, "flow": FEW_COUPLINGS}


def small(**words: Any) -> Options:
    """Three latents, narrow networks, and a small prior."""
    sizes = {"hidden": (5, 4), "latent_dim": 3} | SMALL_PRIORS.get(words.get("prior", ""), {})
    return Options(**(sizes | words))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(4), 2)))
def test_every_pair_of_words_is_built(one: int, other: int) -> None:
    seen = {(words[one], words[other]) for words in TOGETHER_BUILT}
    assert seen == set(itertools.product(PARTS_OF_ONE[one], PARTS_OF_ONE[other]))


@pytest.mark.parametrize(("network", "likelihood", "prior", "posterior"), TOGETHER_BUILT)
def test_a_combination_of_words_builds(network: str, likelihood: str, prior: str, posterior: str) -> None:
    if (prior, posterior) in NO_PAIR:
        with pytest.raises(ValueError, match="--posterior delta: expected --prior standard-normal"):
            build.vae(small(network=network, likelihood=likelihood, prior=prior, posterior=posterior), (1, 2, 3))
        return
    asked = small(network=network, likelihood=likelihood, prior=prior, posterior=posterior)
    vae = build.vae(asked, (1, 2, 3))
    assert vae.likelihood.event_shape == (1, 2, 3)
    assert vae.prior().event_shape == vae.posterior(torch.rand(5, 1, 2, 3)).event_shape == (3,)


FLOWS = [{"prior": "flow", "prior_flow": word} for word in COUPLINGS]
FLOWS += [{"posterior": "flow", "posterior_flow": word, "prior": "vamp"} for word in POSTERIOR_FLOWS]
LAYERED = [
    {"upper_latents": upper, "upper_hidden": (6, 5), "inference": inference, "decoder_input": seen, "prior": prior}
    for upper in ((2,), (4, 2))
    for inference in INFERENCES
    for seen in DECODER_INPUTS
    for prior in PRIORS
    if prior != "vamp"
]


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("words", FLOWS + LAYERED, ids=lambda words: " ".join(map(str, words.values())))
def test_flows_and_several_layers_build_with_and_without_numbers(words: dict[str, Any], place: str) -> None:
    with torch.device(place):
        vae = build.vae(small(**words), (1, 2, 3))
    assert {w.device.type for w in vae.parameters()} == {place}
    assert tuple(vae.likelihood.event_shape) == (1, 2, 3)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_builds_without_numbers_where_it_builds_at_all(likelihood: str, transform: str) -> None:
    """On the meta device, where shapes are counted before anything is trained."""
    asked = Options(likelihood=likelihood, transform=transform, hidden=(5,), latent_dim=3)
    try:
        build.vae(asked, (1, 2, 3))
    except ValueError:
        return
    with torch.device("meta"):
        assert build.vae(asked, (1, 2, 3)).likelihood.event_shape == (1, 2, 3)


# --- Defaults and the round trip ---


def test_no_arguments_ask_for_the_defaults() -> None:
    assert parse_train([]) == TrainCommand(options=Options())


def test_the_default_likelihood_is_bernoulli() -> None:
    assert Options().likelihood == "bernoulli"


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 0), (2, 1), (3, 1), (4, 1), (10, 3), (49, 14), (50, 15), (100, 15), (2000, 15)]
)
def test_the_default_warmup_is_three_tenths_of_the_epochs_at_most_15_and_at_least_one_of_several(
    epochs: int, warmup: int
) -> None:
    assert default_warmup(epochs) == warmup


@pytest.mark.parametrize(
    ("asked", "prior", "objective"),
    [
        ({}, "flow", "stl"),
        ({"latent_dim": 2}, "flow", "stl"),
        ({"latent_dim": 1}, "standard-normal", "stl"),
        ({"latent_dim": 1, "upper_latents": (2,)}, "flow", "stl"),
        ({"upper_latents": (5, 1)}, "standard-normal", "stl"),
        ({"posterior": "full"}, "flow", "stl"),
        ({"posterior": "delta", "beta": 0.0}, "standard-normal", "elbo"),
        ({"kl": "analytic"}, "standard-normal", "elbo"),
        ({"objective": "free-bits"}, "standard-normal", "free-bits"),
        ({"objective": "iwae", "num_particles": 5}, "flow", "iwae"),
        ({"prior": "vamp"}, "vamp", "stl"),
        (PLAIN, "standard-normal", "elbo"),
    ],
    ids=str,
)
def test_a_prior_and_an_objective_that_were_left_open_are_those_that_go_with_the_rest(
    asked: dict[str, Any], prior: str, objective: str
) -> None:
    resolved = build.resolve(Options(**asked), data.load("mnist"))
    assert (resolved.prior, resolved.objective) == (prior, objective)
    assert build.resolve(resolved, data.load("mnist")) == resolved


@pytest.mark.parametrize("decay_start", [Options().decay_start, PLAIN["decay_start"]])
def test_a_start_of_the_cosine_that_nobody_asked_for_stands_beside_stages(decay_start: float) -> None:
    asked = Options(schedule="stages", decay_start=decay_start, hidden=(5,), latent_dim=2)
    assert build.vae(asked, (1, 2, 3)).likelihood.event_shape == (1, 2, 3)


def test_a_config_of_before_there_was_a_choice_is_of_the_plain_vae() -> None:
    """The fields that came later are left out, and the others of it had the same words."""
    plain = Options(**PLAIN, keep="best", dequantization="none")
    later = {*LATER, *OTHERWISE}
    values = {name: value for name, value in to_json(plain).items() if name not in later}
    assert from_json(values) == plain


def test_the_table_of_likelihoods_is_of_plain_vaes() -> None:
    expected = Options(**PLAIN, epochs=10, evaluation_particles=100)
    assert parse_likelihoods([]).options == expected


OTHER = Options(
    dataset="own.npz",
    data_dir="elsewhere",
    protocol="iwae",
    image_size=(28, 20),
    fit="stretch",
    color="rgb",
    channels=(3, 4, 5),
    stream="on",
    tensorboard="on",
    prior="mixture",
    prior_components=7,
    prior_flow="spline",
    prior_layers=3,
    prior_hidden=(9, 8),
    posterior="full",
    posterior_flow="spline",
    posterior_layers=4,
    posterior_hidden=(6,),
    upper_latents=(5, 2),
    upper_hidden=(4,),
    inference="bottom-up",
    decoder_input="all",
    initialization="shrinking",
    schedule="stages",
    decay_start=0.25,
    binarization="threshold",
    dequantization="uniform",
    dequantization_draws=3,
    likelihood_scale=0.25,
    likelihood_components=2,
    transform="logit",
    network="mlp",
    hidden=(7, 5, 3),
    scale_map="softplus",
    objective="free-bits",
    free_bits=0.5,
    kl="analytic",
    beta=0.1,
    warmup_epochs=0,
    latent_dim=2,
    epochs=3,
    batch_size=11,
    learning_rate=1e-5,
    clip_norm=0.5,
    num_particles=4,
    seed=2**31 - 1,
    device="cuda:1",
    checkpoint_seconds=0.25,
    images=8,
    evaluation_particles=9,
)


@pytest.mark.parametrize("asked", [Options(), OTHER], ids=["defaults", "others"])
def test_options_come_back_from_json_as_they_were(asked: Options) -> None:
    assert from_json(json.loads(json.dumps(to_json(asked)))) == asked


def test_json_holds_every_field() -> None:
    assert set(to_json(OTHER)) == {spec.name for spec in fields(Options)}


@pytest.mark.parametrize("asked", [Options(), OTHER], ids=["defaults", "others"])
def test_options_come_back_from_the_command_line_as_they_were(asked: Options) -> None:
    words: list[str] = []
    for name, value in to_json(asked).items():
        if value is not None:
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    assert parse_train(words).options == asked


LATER = [
    "data_dir",
    "protocol",
    "image_size",
    "fit",
    "color",
    "channels",
    "compile",
    "precision",
    "stream",
    "tensorboard",
    "dequantization_draws",
    "likelihood_scale",
    "likelihood_components",
    "transform",
    "scale_map",
    "free_bits",
    "prior_components",
    "prior_flow",
    "prior_layers",
    "prior_hidden",
    "posterior_flow",
    "posterior_layers",
    "posterior_hidden",
    "upper_latents",
    "upper_hidden",
    "inference",
    "decoder_input",
    "skip_norm",
    "schedule",
    "start_from",
]

# What a field that came later means where its default would be wrong: such a run was made otherwise.
OTHERWISE = {
    "dequantization": "none",
    "keep": "best",
    "initialization": "shrinking",
    "decay_start": 0.0,
    "average_decay": 0.0,
}


@pytest.mark.parametrize("name", LATER)
def test_a_field_of_json_that_came_later_means_its_default(name: str) -> None:
    values = to_json(OTHER)
    del values[name]
    assert from_json(values) == replace(OTHER, **{name: getattr(Options(), name)})


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_field_of_json_that_came_later_means_what_was_done_before(name: str) -> None:
    """Whatever the default is: a run saw level / 255, kept its best weights, and averaged none of them."""
    values = to_json(Options())
    del values[name]
    assert getattr(from_json(values), name) == OTHERWISE[name]


@pytest.mark.parametrize("name", [spec.name for spec in fields(Options) if spec.name not in (*LATER, *OTHERWISE)])
def test_a_missing_field_of_json_is_named_and_refused(name: str) -> None:
    values = to_json(Options())
    del values[name]
    with pytest.raises(ValueError, match=f"missing or unknown: {name}$"):
        from_json(values)


def test_unknown_fields_of_json_are_named_and_refused() -> None:
    with pytest.raises(ValueError, match=r"missing or unknown: glitter, sparkle$"):
        from_json(to_json(Options()) | {"sparkle": 1, "glitter": 2})


@pytest.mark.parametrize("values", [[], None, 3, "text"])
def test_json_that_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="expected an object of options, got"):
        from_json(values)


BAD_JSON = [
    ("hidden", 5),
    ("hidden", []),
    ("hidden", "300"),
    ("hidden", [[300]]),
    ("hidden", [300.0]),
    ("channels", []),
    ("channels", None),
    ("image_size", [28.5]),
    ("epochs", 2.0),
    ("epochs", "2"),
    ("epochs", True),
    ("epochs", None),
    ("epochs", [2]),
    ("epochs", 0),
    ("scale_map", "log"),
    ("free_bits", -0.1),
    ("keep", "first"),
    ("beta", "1"),
    ("beta", math.nan),
    ("learning_rate", math.inf),
    ("likelihood", "gaussian"),
    ("likelihood", 3),
    ("binarization", ""),
    ("warmup_epochs", -1),
    ("device", 0),
    ("dataset", ""),
]


@pytest.mark.parametrize(("name", "value"), BAD_JSON, ids=str)
def test_a_field_of_json_of_the_wrong_type_or_range_is_refused(name: str, value: Any) -> None:
    values = to_json(Options()) | {name: value}
    with pytest.raises(ValueError, match=f"{flag(name)}: expected .*, got "):
        from_json(values)


def test_a_whole_number_is_a_float_too() -> None:
    assert from_json(to_json(Options()) | {"beta": 4}).beta == 4


# --- Refusals on the command line ---

_INTEGER_WORDS = ("1.5", "1e3", "nan", "inf", "many", "", "99999999999999999999")
_FLOAT_WORDS = ("-0.5", "nan", "inf", "1e400", "much", "", "0x10")
AT_LEAST_1 = ("0", "-1", "2147483649", *_INTEGER_WORDS)
AT_LEAST_0 = ("-1", "2147483648", *_INTEGER_WORDS)
ABOVE_0 = ("0", "-0.0", "1e-400", *_FLOAT_WORDS)
NOT_BELOW_0 = ("-1", *_FLOAT_WORDS)
A_WORD = ("sparkle", "", "BERNOULLI", "None")

BAD_WORDS = {
    "hidden": AT_LEAST_1,
    "channels": AT_LEAST_1,
    "image_size": AT_LEAST_1,
    "protocol": A_WORD,
    "compile": A_WORD,
    "stream": A_WORD,
    "tensorboard": A_WORD,
    "precision": A_WORD,
    "dequantization": A_WORD,
    "dequantization_draws": AT_LEAST_1,
    "likelihood_scale": ABOVE_0,
    "likelihood_components": AT_LEAST_1,
    "transform": A_WORD,
    "average_decay": ("1", "-0.1", *_FLOAT_WORDS),
    "fit": A_WORD,
    "color": A_WORD,
    "data_dir": ("",),
    "latent_dim": AT_LEAST_1,
    "epochs": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "num_particles": AT_LEAST_1,
    "images": AT_LEAST_1,
    "evaluation_particles": AT_LEAST_1,
    "warmup_epochs": AT_LEAST_0,
    "seed": AT_LEAST_0,
    "learning_rate": ABOVE_0,
    "clip_norm": ABOVE_0,
    "beta": NOT_BELOW_0,
    "checkpoint_seconds": NOT_BELOW_0,
    "binarization": A_WORD,
    "likelihood": A_WORD,
    "network": A_WORD,
    "prior": A_WORD,
    "posterior": A_WORD,
    "prior_components": AT_LEAST_1,
    "prior_flow": A_WORD,
    "prior_layers": AT_LEAST_1,
    "prior_hidden": AT_LEAST_1,
    "posterior_flow": A_WORD,
    "posterior_layers": AT_LEAST_1,
    "posterior_hidden": AT_LEAST_1,
    "upper_latents": AT_LEAST_1,
    "upper_hidden": AT_LEAST_1,
    "inference": A_WORD,
    "decoder_input": A_WORD,
    "initialization": A_WORD,
    "skip_norm": ABOVE_0,
    "schedule": A_WORD,
    "decay_start": ("1", "-0.1", *_FLOAT_WORDS),
    "start_from": ("",),
    "scale_map": A_WORD,
    "objective": A_WORD,
    "free_bits": NOT_BELOW_0,
    "keep": A_WORD,
    "kl": A_WORD,
    "dataset": ("",),
    "device": ("",),
}


def test_every_option_is_refused_something() -> None:
    assert set(BAD_WORDS) == {spec.name for spec in fields(Options)}


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, words in BAD_WORDS.items() for word in words])
def test_a_value_out_of_range_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], name: str, word: str) -> None:
    line = refused(capsys, parse_train, [f"{flag(name)}={word}"])
    assert line.startswith(f"error: {flag(name)}: expected ")
    assert f"got {word!r}" in line


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, words in BAD_WORDS.items() for word in words])
def test_a_value_out_of_range_after_a_space_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], name: str, word: str
) -> None:
    assert flag(name) in refused(capsys, parse_train, [flag(name), word])


EVALUATE_WORDS = {
    "num_particles": AT_LEAST_1,
    "images": AT_LEAST_1,
    "dequantization_draws": AT_LEAST_1,
    "seed": AT_LEAST_0,
    "split": ("valid", "", "all"),
    "device": ("",),
}


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, words in EVALUATE_WORDS.items() for word in words])
def test_a_value_out_of_range_is_refused_by_evaluate(capsys: pytest.CaptureFixture[str], name: str, word: str) -> None:
    line = refused(capsys, parse_evaluate, ["run", f"{flag(name)}={word}"])
    assert line.startswith(f"error: {flag(name)}: expected ")


CERTIFY_WORDS = {
    "images": AT_LEAST_1,
    "simulated": AT_LEAST_0,
    "temperatures": AT_LEAST_1,
    "leapfrogs": AT_LEAST_1,
    "chains": AT_LEAST_1,
    "start": A_WORD,
    "num_particles": AT_LEAST_1,
    "gap_images": AT_LEAST_0,
    "simulations": AT_LEAST_0,
    "draws": AT_LEAST_1,
    "against": ("",),
    "against_data_dir": ("",),
    "output": ("",),
    "seed": AT_LEAST_0,
    "split": ("valid", "", "all"),
    "compile": A_WORD,
    "device": ("",),
}


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, words in CERTIFY_WORDS.items() for word in words])
def test_a_value_out_of_range_is_refused_by_certify(capsys: pytest.CaptureFixture[str], name: str, word: str) -> None:
    line = refused(capsys, parse_certify, ["run", f"{flag(name)}={word}"])
    assert line.startswith(f"error: {flag(name)}: expected ")


def test_the_starts_of_annealing_are_those_that_it_knows() -> None:
    assert AIS_STARTS == ais.STARTS


@pytest.mark.parametrize(
    "words",
    [
        ["--latent", "3"],
        ["--sparkle"],
        ["stray"],
        ["--epochs"],
        ["--hidden"],
        ["--hidden", "3", "x"],
        ["--hidden", "300,300"],
        ["--run-dir", ""],
        ["--resume", ""],
        ["--resume"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    refused(capsys, parse_train, words)


PARSERS = [
    parse_evaluate,
    parse_figures,
    parse_sample,
    parse_encode,
    parse_impute,
    parse_compare,
    parse_certify,
]


@pytest.mark.parametrize("parse", PARSERS)
def test_a_missing_run_folder_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], parse: Any) -> None:
    assert "RUN" in refused(capsys, parse, [])


@pytest.mark.parametrize("name", [spec.name for spec in fields(Options)])
def test_a_wrong_type_is_refused_from_python(name: str) -> None:
    """An object is no value of any option."""
    with pytest.raises(ValueError, match=f"{flag(name)}: expected .*, got <object"):
        replace(Options(), **{name: object()})


# --- What does not go together ---

TOGETHER = {
    "an analytic KL of a flow": (
        {"kl": "analytic", "prior": "flow"},
        "--kl analytic: expected --prior standard-normal, whose KL has a formula, got flow$",
    ),
    "free bits of a full guide": (
        {"objective": "free-bits", "posterior": "full"},
        "--objective free-bits: expected --posterior diagonal, whose KL has a formula, got full$",
    ),
    "delta, a prior that nothing trains": (
        {"posterior": "delta", "beta": 0.0, "prior": "flow", "objective": "elbo"},
        "--posterior delta: expected --prior standard-normal, got flow",
    ),
    "bottom-up, an analytic KL": (
        {"upper_latents": (3,), "inference": "bottom-up", "kl": "analytic", "prior": "standard-normal"},
        "--inference bottom-up: expected a sampled KL",
    ),
    "delta, beta 1": (
        {"posterior": "delta"},
        r"--posterior delta: expected --beta 0 \(a deterministic guide has no KL: .*, got --beta 1$",
    ),
    "delta, beta 0.5": (
        {"posterior": "delta", "beta": 0.5},
        r"--posterior delta: expected --beta 0 .*, got --beta 0\.5$",
    ),
    "delta, free bits": (
        {"posterior": "delta", "beta": 0.0, "objective": "free-bits"},
        "--objective free-bits: expected --posterior diagonal, whose KL has a formula, got delta$",
    ),
    "free bits without their objective": (
        {"free_bits": 0.5},
        "--free-bits: expected --objective free-bits, which it is of, got stl$",
    ),
    "free bits, a KL": (
        {"objective": "free-bits", "kl": "analytic"},
        "--kl: free-bits takes the KL of each latent in closed form; expected no --kl beside it$",
    ),
    "delta, an objective on log-weights": (
        {"posterior": "delta", "beta": 0.0, "objective": "dreg"},
        "--objective dreg: expected --posterior diagonal, got delta$",
    ),
    "an objective on log-weights, a KL": (
        {"objective": "stl", "kl": "analytic"},
        "--kl: stl samples the KL; expected no --kl beside it$",
    ),
    "a flow of one latent": (
        {"prior": "flow", "latent_dim": 1},
        "coupling flow: expected at least 2, one half mapped by the other, got 1$",
    ),
    "several layers, a flow of one latent at the top": (
        {"prior": "flow", "upper_latents": (3, 1)},
        "coupling flow: expected at least 2, one half mapped by the other, got 1$",
    ),
    "several layers, another posterior": (
        {"prior": "standard-normal", "upper_latents": (3,), "posterior": "full"},
        "--upper-latents: expected --posterior diagonal at every layer, got full$",
    ),
    "several layers, a VampPrior": (
        {"upper_latents": (3,), "prior": "vamp"},
        "--upper-latents: expected a --prior with a density of its own, got vamp ",
    ),
}

# Each option that is of some words of another: a value that is no default, the other, a word of it that has no such
# option, and those that have.
OF_WORDS: dict[str, tuple[Any, str, str, str]] = {
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
OF_SEVERAL_LAYERS = {"upper_hidden": (4,), "inference": "bottom-up", "decoder_input": "all"}

TOGETHER |= {
    f"{name} of another {of}": (
        {name: value, of: word} | ({"beta": 0.0, "objective": "elbo"} if word == "delta" else {}),
        f"{flag(name)}: expected {flag(of)} {words}, which it is of, got {word}$",
    )
    for name, (value, of, word, words) in OF_WORDS.items()
}
TOGETHER |= {
    f"{name} of one layer": (
        {name: value},
        f"{flag(name)}: expected --upper-latents beside it, which it is of, got none$",
    )
    for name, value in OF_SEVERAL_LAYERS.items()
}


@pytest.mark.parametrize("name", [*OF_WORDS, *OF_SEVERAL_LAYERS])
def test_an_option_of_its_own_word_is_taken(name: str) -> None:
    """What is refused above is refused for the other word alone."""
    if name in OF_SEVERAL_LAYERS:
        asked = {name: OF_SEVERAL_LAYERS[name], "upper_latents": (2,), "prior": "standard-normal"}
    else:
        value, of, _, words = OF_WORDS[name]
        asked = {name: value, of: words.split(" or ")[0]}
    build.vae(Options(**({"hidden": (5,)} | asked)), (1, 2, 3))


@pytest.mark.parametrize("words", TOGETHER)
def test_options_that_do_not_go_together_are_refused_and_leave_nothing(tmp_path: Path, words: str) -> None:
    asked, expected = TOGETHER[words]
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
def test_options_that_go_together_are_taken_as_they_are(asked: dict[str, Any]) -> None:
    resolved = build.resolve(Options(**asked), data.load("mnist"))
    assert {name: getattr(resolved, name) for name in asked} == asked


# --- Resume ---


def test_resume_alone_asks_for_its_folder() -> None:
    assert parse_train(["--resume", "runs/x"]) == TrainCommand(resume="runs/x")


def test_resume_takes_more_epochs() -> None:
    asked = parse_train(["--resume", "runs/x", "--epochs", "7"])
    assert asked == TrainCommand(resume="runs/x", epochs=7)


def test_resume_takes_where_the_data_is_now() -> None:
    asked = parse_train(["--resume", "runs/x", "--dataset", "moved.npz", "--data-dir", "there"])
    assert asked == TrainCommand(resume="runs/x", dataset="moved.npz", data_dir="there")


BESIDE = ("epochs", "dataset", "data_dir", "compile")
OTHERS = {spec.name: spec.default for spec in fields(Options) if spec.name not in BESIDE} | {"run_dir": "runs/y"}


@pytest.mark.parametrize("parse", PARSERS)
def test_every_script_of_a_run_takes_where_the_data_is_now(parse: Any) -> None:
    run = ["run", "other"] if parse in (parse_encode, parse_impute, parse_compare) else ["run"]
    asked = parse([*run, "--dataset", "moved.npz", "--data-dir", "there"])
    assert (asked.dataset, asked.data_dir) == ("moved.npz", "there")


@pytest.mark.parametrize("name", OTHERS)
def test_resume_with_another_option_is_refused(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Even where the value is the one that the run has: a run keeps its own options."""
    given = {
        "binarization": "fixed",
        "warmup_epochs": 3,
        "hidden": 5,
        "image_size": 28,
        "color": "gray",
        "dequantization": "none",
        "keep": "last",
        "prior": "flow",
        "objective": "stl",
        "upper_latents": 3,
        "skip_norm": 1e6,
    }.get(name, OTHERS[name])
    values = given if isinstance(given, tuple) else (given,)
    line = refused(capsys, parse_train, ["--resume", "runs/x", "--epochs", "7", flag(name), *map(str, values)])
    assert line.startswith("error: --resume: the run keeps its own options; beside it only --epochs, --dataset, ")
    assert f"got {flag(name)} " in line


# --- What ends a script ---


@pytest.mark.parametrize("error", [ValueError("x: bad"), OSError(28, "disk full"), ArithmeticError("x: NaN")])
def test_what_a_user_can_cause_ends_in_one_line(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=r"^1$"):
        command(main)
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_ends_with_code_130_and_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^130$"):
        command(main)
    assert capsys.readouterr().err.strip() == "interrupted"


def test_our_own_bugs_keep_their_traceback() -> None:
    def main() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        command(main)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
    ],
)
def test_memory_that_ran_out_ends_in_one_line(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=r"^1$"):
        command(main)
    assert capsys.readouterr().err.startswith("error: out of memory; a smaller batch")


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "Triton: shared memory"])
def test_another_error_of_memory_keeps_its_traceback(words: str) -> None:
    def main() -> None:
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        command(main)


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise ValueError("x: bad")

    monkeypatch.setenv("PPL_VAE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x: bad"):
        command(main)
