"""Every word, and all that decides a run: its options, their defaults and checks, and how config.json holds them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ppl_vae.data.registry import BINARIZATIONS, COLORS, DATASETS, DEQUANTIZATIONS, FITS, PROTOCOLS

TRANSFORMS = ("none", "logit")
LIKELIHOODS = (
    "bernoulli",
    "categorical",
    "discretized-logistic",
    "discretized-logistic-mixture",
    "binomial",
    "continuous-bernoulli",
    "beta",
    "logit-normal",
    "normal",
    "normal-fixed",
    "normal-optimal",
    "normal-per-pixel",
    "laplace",
    "student-t",
    "poisson",
    "negative-binomial",
)
NETWORKS = ("mlp", "tanh", "gated", "conv", "gated-conv", "residual", "gated-residual")
DENSE_NETWORKS = ("mlp", "tanh", "gated")
PRIORS = ("standard-normal", "mixture", "vamp", "flow")
COUPLINGS = ("affine", "spline")
POSTERIORS = ("diagonal", "full", "flow", "delta")
POSTERIOR_FLOWS = ("iaf", "spline")
INFERENCES = ("top-down", "bottom-up")
DECODER_INPUTS = ("bottom", "all")
INITIALIZATIONS = ("shrinking", "wide")
SCALE_MAPS = ("bounded", "exp", "softplus")
OBJECTIVES = ("elbo", "free-bits", "iwae", "dreg", "stl")
SCHEDULES = ("cosine", "stages")
KLS = ("sampled", "analytic")
KEEPS = ("best", "last")
COMPILES = ("auto", "on", "off")
PRECISIONS = ("float32", "tf32", "bf16")
STREAMS = ("auto", "on", "off")
TENSORBOARDS = ("off", "on")
SIDES = ("top", "bottom", "left", "right")

# The plain VAE: N(0, I), the sampled ELBO, torch's start, a rate that falls from the first step, no average. It is what
# the study, the tables and the benchmark are of, whatever the defaults are.
PLAIN: dict[str, Any] = {
    "prior": "standard-normal",
    "objective": "elbo",
    "initialization": "shrinking",
    "learning_rate": 3e-3,
    "decay_start": 0.0,
    "average_decay": 0.0,
}


@dataclass(frozen=True)
class Check:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE_INTEGER = Check("a whole number, at least 1", lambda v: 1 <= v <= 2**31)
WIDTH = Check("a whole number, 1 to 65,536", lambda v: 1 <= v <= 2**16)
NON_NEGATIVE_INTEGER = Check("a whole number, 0 to 2^31 - 1", lambda v: 0 <= v < 2**31)
POSITIVE = Check("a finite number above 0", lambda v: 0 < v < math.inf)
NON_NEGATIVE = Check("a finite number, at least 0", lambda v: 0 <= v < math.inf)
BELOW_ONE = Check("a number, 0 or more and below 1", lambda v: 0 <= v < 1)
NOT_EMPTY = Check("a word", lambda v: bool(v))


def one_of(words: Sequence[str]) -> Check:
    """One of these words."""
    return Check(f"one of {', '.join(words)}", lambda v: v in words)


def option(
    default: Any,
    kind: type,
    check: Check,
    text: str,
    *,
    several: bool = False,
    later: bool = False,
    before: Any = None,
) -> Any:
    """A dataclass field that is an option: its default, the type of one value, what holds of it, its help.

    ``several`` values make a list. A ``later`` option is younger than some config.json, which then means ``before``, or
    its default.
    """
    meant = default if before is None else before
    metadata = {"kind": kind, "check": check, "help": text, "several": several, "later": later, "before": meant}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All that decides a run. config.json holds every field."""

    dataset: str = option(
        "mnist",
        str,
        NOT_EMPTY,
        f"{', '.join(DATASETS)}, or the path of your own .npz or .npy file, or of a folder of images",
    )
    data_dir: str | None = option(
        None,
        str,
        NOT_EMPTY,
        "folder of the named data sets (default: the environment variable PPL_VAE_DATA_DIR, else data)",
        later=True,
    )
    protocol: str = option(
        "vampprior",
        str,
        one_of(PROTOCOLS),
        "vampprior: validation split, test drawn once; iwae: all 60,000 train, test drawn by the evaluation's seed",
        later=True,
    )
    image_size: tuple[int, ...] | None = option(
        None,
        int,
        WIDTH,
        "of a folder of images: height and width (or one number for both) to which each is brought",
        several=True,
        later=True,
    )
    fit: str = option(
        "crop",
        str,
        one_of(FITS),
        "how: crop (cover the size, cut the middle) or stretch (lose the aspect ratio)",
        later=True,
    )
    color: str | None = option(
        None,
        str,
        one_of(COLORS),
        "of a folder of images: gray or rgb (default: gray where all of them are)",
        later=True,
    )
    binarization: str | None = option(
        None,
        str,
        one_of(BINARIZATIONS),
        f"how gray becomes black and white: {', '.join(BINARIZATIONS)} "
        "(default: dynamic for gray data under a likelihood of zeros and ones, else none)",
    )
    dequantization: str | None = option(
        None,
        str,
        one_of(DEQUANTIZATIONS),
        "of 8-bit levels under a density: uniform, (level + u) / 256; or none, level / 255, whose density has no bound "
        "and compares with nothing else (default: uniform)",
        later=True,
        before="none",
    )
    dequantization_draws: int = option(
        16,
        int,
        POSITIVE_INTEGER,
        "without effect: the masses of levels are exact under every density of --likelihood",
        later=True,
    )
    likelihood: str = option("bernoulli", str, one_of(LIKELIHOODS), f"p(x | z): {', '.join(LIKELIHOODS)}")
    likelihood_scale: float = option(
        0.5,
        float,
        POSITIVE,
        "of normal-fixed: its scale, as a share of the training pixels' spread",
        later=True,
    )
    likelihood_components: int = option(
        5, int, WIDTH, "of discretized-logistic-mixture: logistic distributions a pixel", later=True
    )
    transform: str = option(
        "none",
        str,
        one_of(TRANSFORMS),
        "of pixels between 0 and 1 under a density of real numbers: none, or logit (its Jacobian is counted)",
        later=True,
    )
    network: str = option("gated", str, one_of(NETWORKS), f"encoder and decoder: {', '.join(NETWORKS)}")
    hidden: tuple[int, ...] | None = option(
        None,
        int,
        WIDTH,
        "widths of the encoder's dense hidden layers, the decoder's in reverse "
        "(default: 300 300 for dense networks, 256 for the others, between convolutions and latents)",
        several=True,
    )
    channels: tuple[int, ...] = option(
        (16, 32),
        int,
        WIDTH,
        "of convolutional networks: channels of each stage, which halves height and width",
        several=True,
        later=True,
    )
    prior: str | None = option(
        None,
        str,
        one_of(PRIORS),
        f"p(z): {', '.join(PRIORS)} (default: flow; standard-normal where the objective takes the KL in closed form, "
        "beside a delta posterior, and of one latent)",
    )
    prior_components: int = option(
        500, int, WIDTH, "of the priors mixture and vamp: normals, or pseudo-images", later=True
    )
    prior_flow: str = option(
        "affine", str, one_of(COUPLINGS), "of the prior flow: its couplings, affine or spline", later=True
    )
    prior_layers: int = option(10, int, WIDTH, "of the prior flow: couplings", later=True)
    prior_hidden: tuple[int, ...] = option(
        (256,), int, WIDTH, "of the prior flow: widths of each coupling's hidden layers", several=True, later=True
    )
    posterior: str = option(
        "diagonal",
        str,
        one_of(POSTERIORS),
        "q(z | x): diagonal or full normal, flow, or delta, which with --beta 0 makes a plain autoencoder (no "
        "log-likelihood)",
    )
    posterior_flow: str = option(
        "iaf", str, one_of(POSTERIOR_FLOWS), "of the posterior flow: its layers, iaf or spline", later=True
    )
    posterior_layers: int = option(2, int, WIDTH, "of the posterior flow: layers", later=True)
    posterior_hidden: tuple[int, ...] = option(
        (256,), int, WIDTH, "of the posterior flow: widths of each layer's hidden layers", several=True, later=True
    )
    upper_latents: tuple[int, ...] | None = option(
        None,
        int,
        WIDTH,
        "dimensions of further layers of latents above z, from the bottom to the top (default: none)",
        several=True,
        later=True,
    )
    upper_hidden: tuple[int, ...] = option(
        (100, 100),
        int,
        WIDTH,
        "of each further layer: widths of the hidden layers to and from it",
        several=True,
        later=True,
    )
    inference: str = option(
        "top-down",
        str,
        one_of(INFERENCES),
        "of several layers of latents: top-down (a ladder, q(z_l | x, z_l+1)) or bottom-up, q(z_l+1 | z_l)",
        later=True,
    )
    decoder_input: str = option(
        "bottom",
        str,
        one_of(DECODER_INPUTS),
        "of several layers of latents: what the decoder sees, bottom (the layer next to the image) or all",
        later=True,
    )
    scale_map: str = option(
        "bounded",
        str,
        one_of(SCALE_MAPS),
        "of every posterior but delta, from a feature to a scale: bounded (exp of 7 tanh(h / 7)), exp, softplus",
        later=True,
    )
    objective: str | None = option(
        None,
        str,
        one_of(OBJECTIVES),
        f"what is maximized: {', '.join(OBJECTIVES)} (default: stl, the ELBO by a gradient of less noise; elbo with "
        "--kl analytic, and of a flow or delta posterior)",
    )
    free_bits: float = option(
        0.1,
        float,
        NON_NEGATIVE,
        "of the objective free-bits: nats a latent below which its mean KL costs nothing",
        later=True,
    )
    kl: str = option(
        "sampled", str, one_of(KLS), "the KL in the objective: sampled (Trace_ELBO), analytic (TraceMeanField_ELBO)"
    )
    beta: float = option(1.0, float, NON_NEGATIVE, "weight of the KL in training; reports are always at 1")
    warmup_epochs: int | None = option(
        None,
        int,
        NON_NEGATIVE_INTEGER,
        "epochs over which that weight rises linearly from 0 (default: three tenths of the epochs, 1 to 15; none for a "
        "single epoch, and beside --start-from)",
    )
    latent_dim: int = option(40, int, WIDTH, "dimensions of z")
    epochs: int = option(50, int, POSITIVE_INTEGER, "passes through the training images")
    batch_size: int = option(100, int, POSITIVE_INTEGER, "images a step")
    learning_rate: float = option(2e-3, float, POSITIVE, "Adam's, at the start")
    initialization: str = option(
        "wide",
        str,
        one_of(INITIALIZATIONS),
        "of the dense hidden layers of encoder and decoder: shrinking, torch's own, or wide, with three times its "
        "variance",
        later=True,
        before="shrinking",
    )
    schedule: str = option(
        "cosine",
        str,
        one_of(SCHEDULES),
        "how it falls: to 0 on a cosine, or in the eight stages of Burda et al., each three times as long as the last",
        later=True,
    )
    decay_start: float = option(
        0.5,
        float,
        BELOW_ONE,
        "share of the steps after which the cosine begins; the rate is flat until then",
        later=True,
        before=0.0,
    )
    start_from: str | None = option(
        None,
        str,
        NOT_EMPTY,
        "run folder whose weights training starts from, a trained run of the same model (default: fresh weights)",
        later=True,
    )
    clip_norm: float = option(100.0, float, POSITIVE, "largest norm of the whole gradient")
    skip_norm: float | None = option(
        None,
        float,
        POSITIVE,
        "a step whose gradient's norm is above this, or not finite, is left out (default: no such step)",
        later=True,
    )
    keep: str | None = option(
        None,
        str,
        one_of(KEEPS),
        "the weights that are kept: best, by the validation ELBO at beta = 1 (L_k of the objectives iwae and dreg), or "
        "last (default: best where beta is 1, else last, since that would choose weights from before beta had its "
        "effect)",
        later=True,
        before="best",
    )
    average_decay: float = option(
        0.999,
        float,
        BELOW_ONE,
        "of a moving average of the weights, which is then what is validated, kept and evaluated; 0: none",
        later=True,
        before=0.0,
    )
    compile: str = option(
        "auto",
        str,
        one_of(COMPILES),
        "the training step as one compiled graph: on, off, or auto (for many steps, where there is a compiler)",
        later=True,
    )
    precision: str = option(
        "float32",
        str,
        one_of(PRECISIONS),
        "of products in training: float32, tf32 (NVIDIA GPUs), bf16; the final evaluation is always in float32",
        later=True,
    )
    stream: str = option(
        "auto",
        str,
        one_of(STREAMS),
        "training images stay where they are, and each batch is brought to the device: on, off, or auto (where they "
        "take more than half of its free memory)",
        later=True,
    )
    num_particles: int = option(1, int, POSITIVE_INTEGER, "draws of z an image and step, in training")
    seed: int = option(0, int, NON_NEGATIVE_INTEGER, "of the weights, the noise and the order of the images")
    device: str = option("cpu", str, NOT_EMPTY, "cpu, cuda, cuda:1, ...")
    checkpoint_seconds: float = option(60.0, float, NON_NEGATIVE, "longest time between two checkpoints")
    images: int = option(
        5000, int, POSITIVE_INTEGER, "test images of the quick evaluation at the end; a fixed random subset"
    )
    evaluation_particles: int = option(
        200, int, POSITIVE_INTEGER, "importance samples an image of the quick evaluation"
    )
    tensorboard: str = option(
        "off",
        str,
        one_of(TENSORBOARDS),
        "on: the numbers of metrics.jsonl and of the evaluation also as TensorBoard's events (its own package)",
        later=True,
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = _plain(spec, getattr(self, spec.name))
            _check(spec, value)
            object.__setattr__(self, spec.name, value)


# What a model and its data are, beside how it is trained: a run that starts from another takes these from it.
MODEL_OPTIONS = (
    *("dataset", "data_dir", "protocol", "image_size", "fit", "color", "binarization", "dequantization"),
    *("likelihood", "likelihood_scale", "likelihood_components", "transform", "network", "hidden", "channels"),
    *("prior", "prior_components", "prior_flow", "prior_layers", "prior_hidden"),
    *("posterior", "posterior_flow", "posterior_layers", "posterior_hidden", "scale_map", "latent_dim"),
    *("upper_latents", "upper_hidden", "inference", "decoder_input"),
)


def _plain(spec: Any, value: Any) -> Any:
    """Python's own number for one of NumPy's; a tuple for a list, an array or a lone number of an option of several."""
    value = _python_number(value)  # an array becomes a list
    if not spec.metadata["several"]:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    return tuple(map(_python_number, value)) if isinstance(value, list | tuple) else value


def _python_number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _check(spec: Any, value: Any) -> None:
    if value is None and spec.default is None:
        return
    kind, check, several = spec.metadata["kind"], spec.metadata["check"], spec.metadata["several"]
    if several and (not isinstance(value, tuple) or not value):
        raise ValueError(f"{flag(spec.name)}: expected a list, each {check.words}, got {value!r}")
    for one in value if several else (value,):
        right_type = isinstance(one, (int, float) if kind is float else kind) and not isinstance(one, bool)
        if not right_type or not check.holds(one):
            raise ValueError(f"{flag(spec.name)}: expected {check.words}, got {one!r}")


def flag(name: str) -> str:
    """The field's name as it is typed."""
    return "--" + name.replace("_", "-")


def default_hidden(network: str) -> tuple[int, ...]:
    """Two layers of 300 as in Tomczak and Welling 2018; one of 256 where convolutions do most of the work."""
    return (300, 300) if network in DENSE_NETWORKS else (256,)


def default_prior(options: Options) -> str:
    """A flow; N(0, I) where the KL is in closed form or there is none, and of one latent, which has no halves."""
    in_closed_form = options.kl == "analytic" or options.objective == "free-bits"
    top = (options.upper_latents or (options.latent_dim,))[-1]
    return "standard-normal" if in_closed_form or options.posterior == "delta" or top == 1 else "flow"


def default_objective(options: Options) -> str:
    """The ELBO without the score of q in its gradient; with it where that is dear, or the KL in closed form, or none.

    Without the score a flow guide is inverted at every step: an autoregressive one took 6.6 times as long so.
    """
    return "elbo" if options.kl == "analytic" or options.posterior in ("delta", "flow") else "stl"


def default_warmup(epochs: int) -> int:
    """Three tenths of the epochs, at most 15 and at least one of several.

    Without a warm-up latents collapse early, and stay collapsed: after two epochs on MNIST the plain VAE's validation
    ELBO was -121.0 nats without one and -107.9 with one epoch of it (residual network: -204.8, that of no latents, and
    -102.2).
    """
    return 0 if epochs == 1 else max(1, min(15, 3 * epochs // 10))


# A graph compiles in about 10 s, and each run of it saves some milliseconds.
_RUNS_THAT_PAY = 5000


def compiling_pays(runs: int) -> bool:
    """Whether ``--compile auto`` compiles a graph that will run so many times."""
    return runs >= _RUNS_THAT_PAY


def model_options(config: Any) -> dict[str, Any]:
    """What a run's model and its data are, of its config.json: what a training that starts from its weights takes over.

    Raises:
        ValueError: no options in it, or such as ``from_json`` refuses.
    """
    if not isinstance(config, dict) or not {"options", "model"} & config.keys():
        raise ValueError("expected an object with options")
    other = options_of(config)
    return {name: getattr(other, name) for name in MODEL_OPTIONS}


def to_json(options: Options) -> dict[str, Any]:
    """Every field, as config.json holds it."""
    return json.loads(json.dumps(asdict(options)))


def from_json(values: Any) -> Options:
    """Back from config.json.

    Raises:
        ValueError: a field that is missing, unknown, or out of its range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected an object of options, got {type(values).__name__}")
    values = {spec.name: spec.metadata["before"] for spec in fields(Options) if spec.metadata["later"]} | values
    known = {spec.name for spec in fields(Options)}
    if set(values) != known:
        odd = sorted(set(values) ^ known)
        raise ValueError(f"expected exactly the options of this version; missing or unknown: {', '.join(odd)}")
    return Options(**_checked(values))


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Values from JSON, whose lists become tuples. A file is held to what this program writes: no lone numbers."""
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    for spec in fields(Options):
        if spec.name in found:
            _check(spec, found[spec.name])
    return found


# --- An export: the model without its training ---

EXPORT_FORMAT = "ppl_vae model 1"  # the "format" of its config.json
_EXPORTED = (*(name for name in MODEL_OPTIONS if name != "data_dir"), "dequantization_draws")


def model_to_json(options: Options) -> dict[str, Any]:
    """The model's own options, as an export's config.json holds them: of the data no folder, but its name."""
    name = options.dataset
    if name not in DATASETS:
        name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        name = f"own {name}" if name in DATASETS else name or "data"  # no path may become the name of another data set
    values = to_json(options) | {"dataset": name}
    return {name: values[name] for name in _EXPORTED}


def model_from_json(values: Any) -> Options:
    """Back from an export's config.json. What it says nothing of, the training, has its defaults.

    Raises:
        ValueError: an option that is missing, unknown, or out of its range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected an object of options under model, got {type(values).__name__}")
    specs = {spec.name: spec for spec in fields(Options) if spec.name in _EXPORTED}
    values = {name: spec.metadata["before"] for name, spec in specs.items() if spec.metadata["later"]} | values
    if set(values) != set(specs):
        odd = sorted(set(values) ^ set(specs))
        raise ValueError(f"expected exactly the model's options; missing or unknown: {', '.join(odd)}")
    options = Options(**_checked(values))
    return replace(options, objective=default_objective(options), warmup_epochs=0)


def is_export(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of an export, which tells of a model and not of a run."""
    return "format" in config


def options_of(config: dict[str, Any]) -> Options:
    """The options of a run's config.json, or of an export's.

    Raises:
        KeyError: it has none.
        ValueError: an unknown format, or options out of their range.
    """
    if not is_export(config):
        return from_json(config["options"])
    if config["format"] != EXPORT_FORMAT:
        raise ValueError(f"format: expected {EXPORT_FORMAT!r}, got {config['format']!r}; another version wrote it")
    return model_from_json(config["model"])
