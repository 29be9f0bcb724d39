"""All options of a run, as dataclass fields: each declares its default, help, check and group once.

The command line, ``--config FILE.toml``, the checks of Python callers and ``config.json`` all read these fields.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from ppl_vae.data import BINARIZATIONS, COLORS, DATASETS, DEQUANTIZATIONS, FITS, PROTOCOLS
from ppl_vae.data import MISSING as MISSING_WORDS
from ppl_vae.parts import registry as parts
from ppl_vae.runs.files import JsonObject

T = TypeVar("T")
REQUIRED: Any = MISSING  # the default of an option that must be given
KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Check:
    """A condition on a value, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE_INTEGER = Check("a whole number, at least 1", lambda v: 1 <= v <= 2**31)
WIDTH = Check("a whole number, 1 to 65,536", lambda v: 1 <= v <= 2**16)
NON_NEGATIVE_INTEGER = Check("a whole number, 0 to 2^31 - 1", lambda v: 0 <= v < 2**31)
POSITIVE = Check("a finite number above 0", lambda v: 0 < v < math.inf)
NON_NEGATIVE = Check("a finite number, at least 0", lambda v: 0 <= v < math.inf)
BELOW_ONE = Check("a number, 0 or more and below 1", lambda v: 0 <= v < 1)
NOT_EMPTY = Check("a word", lambda v: bool(v))
BOOLEAN = Check("true or false", lambda v: v in (True, False))


def option(
    default: T,
    help: str,
    check: Check | Iterable[str] = NOT_EMPTY,
    group: str = "",
    *,
    rare: bool = False,
    positional: bool = False,
) -> T:
    """A dataclass field that is an option.

    Args:
        default: Its value where nothing is given; ``REQUIRED`` for an argument that must be given.
        help: One line for ``--help``; the default is added to it.
        check: What each value must satisfy, or the words to choose from.
        group: The heading that it stands under in ``--help``.
        rare: Whether only ``--help-all`` shows it.
        positional: Whether it is an argument without a flag.
    """
    choices = None
    if not isinstance(check, Check):
        choices = tuple(check)
        check = Check(f"one of {', '.join(choices)}", choices.__contains__)
    shown = {"help": help, "group": group, "rare": rare, "positional": positional}
    return field(default=default, metadata=shown | {"check": check, "choices": choices})


def _rare(default: T, help: str, check: Check | Iterable[str] = NOT_EMPTY, group: str = "") -> T:
    """An option that only ``--help-all`` shows."""
    return option(default, help, check, group, rare=True)


def format_flag(name: str) -> str:
    """A field's name as it is typed.

    >>> format_flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def get_kind(spec: Field[object]) -> type:
    """The type of one value: int, float, str or bool, as the annotation says."""
    return next(kind for word, kind in KINDS.items() if re.search(word, str(spec.type)))


def is_list(spec: Field[object]) -> bool:
    """Whether the option takes several values."""
    return "tuple[" in str(spec.type)


class CheckedOptions:
    """Base of options whose values are checked when they are made."""

    def __post_init__(self) -> None:
        for spec in fields(self):  # type: ignore[arg-type]
            if "check" in spec.metadata:
                value = convert_value(spec, getattr(self, spec.name))
                check_value(spec, value)
                object.__setattr__(self, spec.name, value)


def convert_value(spec: Field[object], value: object) -> object:
    """Converts NumPy's numbers and arrays to Python's, and lists and single values to tuples where a list is meant."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not is_list(spec):
        return value
    if isinstance(value, int | str) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, list | tuple):
        return value
    return tuple(each.tolist() if hasattr(each, "tolist") else each for each in value)


def check_value(spec: Field[object], value: object) -> None:
    """Raises ValueError unless the value has the option's type and satisfies its check."""
    if value is None and "None" in str(spec.type):
        return
    kind, check = get_kind(spec), spec.metadata["check"]
    name = spec.name.upper() if spec.metadata["positional"] else format_flag(spec.name)
    if is_list(spec) and (not isinstance(value, tuple) or not value):
        raise ValueError(f"{name}: expected a list, each {check.words}, got {value!r}")
    for one in value if is_list(spec) and isinstance(value, tuple) else (value,):
        has_type = isinstance(one, (int, float) if kind is float else kind)
        if not has_type or (isinstance(one, bool) and kind is not bool) or not check.holds(one):
            raise ValueError(f"{name}: expected {check.words}, got {one!r}")


def expand_home(value: object) -> object:
    """The value with the home folder in place of a leading ~, which a shell leaves alone in --name=~/photos."""
    if isinstance(value, list | tuple):
        return tuple(map(expand_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


# --- The options of a run ---

COMPILES = ("auto", "on", "off")
CONDITIONS = ("none", "labels")
PRECISIONS = ("float32", "tf32", "bf16")
PLACES = ("data_dir", "start_from")  # options that are paths on the machine of a training

# The plain VAE, which the study, the tables and the benchmark train: N(0, I), the sampled ELBO, torch's own
# initialization, a rate that falls from the first step, and no averaged weights.
PLAIN: JsonObject = {
    "prior": "standard-normal",
    "objective": "elbo",
    "initialization": "shrinking",
    "learning_rate": 3e-3,
    "decay_start": 0.0,
    "average_decay": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Options(CheckedOptions):
    """All options of a run, as in ``config.json``."""

    dataset: str = option(
        "mnist", f"{', '.join(DATASETS)}; or the path of an .npz or .npy file or a folder of images", NOT_EMPTY, "data"
    )
    data_dir: str | None = option(
        None, "folder of the named data sets (default: environment variable PPL_VAE_DATA_DIR, else data)", group="data"
    )
    protocol: str = _rare(
        "vampprior",
        "vampprior: validation images, test drawn once; iwae: all 60,000 images train, test drawn anew",
        PROTOCOLS,
        "data",
    )
    image_size: tuple[int, ...] | None = option(
        None, "height and width to which a folder's images are brought; one number for both", WIDTH, "data"
    )
    fit: str = _rare("crop", "how: crop the middle, or stretch", FITS, "data")
    color: str | None = _rare(None, "of a folder's images (default: gray where all of them are)", COLORS, "data")
    binarization: str | None = option(
        None,
        "how gray pixels become zeros and ones (default: dynamic under a likelihood of zeros and ones)",
        BINARIZATIONS,
        "data",
    )
    dequantization: str | None = _rare(
        None,
        "8-bit levels under a density: uniform, (level + u) / 256, or none, level / 255 (default: uniform)",
        DEQUANTIZATIONS,
        "data",
    )

    missing: str = option(
        "forbid",
        "NaN in an .npz or .npy file: forbid, or train, where missing at random values leave the likelihood",
        MISSING_WORDS,
        "data",
    )

    condition: str = option(
        "none", "labels: p(x | y) of images given their label, and the classifier p(y | x)", CONDITIONS, "model"
    )
    classes: int | None = _rare(
        None, "number of classes of --condition labels (default: those of the training labels)", WIDTH, "model"
    )
    labels: int | None = option(
        None, "training labels that are kept, balanced; a semi-supervised VAE learns the others", WIDTH, "model"
    )
    likelihood: str = option("bernoulli", "p(x | z)", parts.LIKELIHOODS, "model")
    likelihood_scale: float = _rare(
        0.5, "scale of normal-fixed, as a fraction of the spread of the training pixels", POSITIVE, "model"
    )
    likelihood_components: int = _rare(5, "logistics per pixel of discretized-logistic-mixture", WIDTH, "model")
    transform: str = _rare(
        "none", "logit: put a density of real numbers on the logit of pixels in (0, 1)", ("none", "logit"), "model"
    )
    network: str = option("gated", "encoder and decoder", parts.NETWORKS, "model")
    hidden: tuple[int, ...] | None = option(
        None,
        "widths of the encoder's dense layers, reversed in the decoder (default: 300 300; 256 with convolutions)",
        WIDTH,
        "model",
    )
    missing_mask: str = _rare(
        "off", "of --missing train: whether the encoder also sees which values are missing", ("off", "on"), "model"
    )
    channels: tuple[int, ...] = option((16, 32), "channels of each stage of a convolutional network", WIDTH, "model")
    latent_dim: int = option(40, "dimensions of z", WIDTH, "model")
    prior: str | None = option(
        None,
        "p(z) (default: flow; standard-normal with an analytic KL, free bits, --labels, a delta posterior or one "
        "latent)",
        parts.PRIORS,
        "model",
    )
    prior_components: int = _rare(500, "components of mixture and vamp", WIDTH, "model")
    prior_flow: str = _rare("affine", "couplings of the flow prior", parts.COUPLINGS, "model")
    prior_layers: int = _rare(10, "number of couplings of the flow prior", WIDTH, "model")
    prior_hidden: tuple[int, ...] = _rare((256,), "widths of the hidden layers of each coupling", WIDTH, "model")
    posterior: str = option("diagonal", "the guide q(z | x)", parts.POSTERIORS, "model")
    posterior_flow: str = _rare("iaf", "layers of the flow posterior", parts.POSTERIOR_FLOWS, "model")
    posterior_layers: int = _rare(2, "number of layers of the flow posterior", WIDTH, "model")
    posterior_hidden: tuple[int, ...] = _rare(
        (256,), "widths of the hidden layers of each layer of the flow posterior", WIDTH, "model"
    )
    scale_map: str = _rare("bounded", "from the encoder's output h to the guide's scale", parts.SCALE_MAPS, "model")
    upper_latents: tuple[int, ...] | None = _rare(
        None, "dimensions of further latent layers above z, from the bottom to the top", WIDTH, "model"
    )
    upper_hidden: tuple[int, ...] = _rare(
        (100, 100), "widths of the hidden layers to and from each further layer", WIDTH, "model"
    )
    inference: str = _rare(
        "top-down", "guide of several layers: top-down (a ladder) or bottom-up", ("top-down", "bottom-up"), "model"
    )
    decoder_input: str = _rare(
        "bottom", "what the decoder sees of several layers: the bottom one, or all", ("bottom", "all"), "model"
    )

    objective: str | None = option(
        None,
        "what is maximized (default: stl; elbo with --kl analytic and with a flow or delta posterior; semi-supervised "
        "with --labels)",
        parts.OBJECTIVES,
        "objective",
    )
    beta: float = option(
        1.0, "weight of the KL in training (beta-VAE); reports are always at 1", NON_NEGATIVE, "objective"
    )
    warmup_epochs: int | None = option(
        None,
        "epochs in which that weight rises from 0 (default: 0.3 of the epochs, at most 15; 0 with --start-from)",
        NON_NEGATIVE_INTEGER,
        "objective",
    )
    kl: str = _rare("sampled", "sampled (Trace_ELBO), or in closed form (TraceMeanField_ELBO)", parts.KLS, "objective")
    free_bits: float = _rare(
        0.1, "nats of KL that cost nothing, for each latent, of free-bits", NON_NEGATIVE, "objective"
    )
    label_weight: float = _rare(
        20.0, "weight of the classifier's loss in semi-supervised, nats", NON_NEGATIVE, "objective"
    )
    label_consistency: float = _rare(
        1.0, "weight within it of similar images' having one label; 0: plain M2", NON_NEGATIVE, "objective"
    )
    num_particles: int = option(1, "samples of z per image and training step", POSITIVE_INTEGER, "objective")

    epochs: int = option(50, "passes through the training images", POSITIVE_INTEGER, "optimization")
    batch_size: int = option(100, "images per step", POSITIVE_INTEGER, "optimization")
    learning_rate: float = option(2e-3, "Adam's learning rate at the start", POSITIVE, "optimization")
    schedule: str = _rare("cosine", "how the learning rate falls", parts.SCHEDULES, "optimization")
    decay_start: float = _rare(0.5, "fraction of the steps before the cosine begins", BELOW_ONE, "optimization")
    initialization: str = _rare(
        "wide",
        "dense hidden layers: shrinking (torch's own), or wide (three times its variance)",
        ("shrinking", "wide"),
        "optimization",
    )
    dropout: float = _rare(
        0.0, "probability that training sets a hidden unit of the decoder to 0", BELOW_ONE, "optimization"
    )
    start_from: str | None = _rare(None, "run folder whose weights training starts from", group="optimization")
    clip_norm: float = _rare(100.0, "largest norm of the whole gradient", POSITIVE, "optimization")
    skip_norm: float | None = _rare(None, "leave out steps whose gradient has a larger norm", POSITIVE, "optimization")
    average_decay: float = _rare(
        0.999, "decay of averaged weights, which are validated, kept and evaluated; 0: none", BELOW_ONE, "optimization"
    )
    keep: str | None = _rare(
        None,
        "weights that are kept: best by validation, or last (default: best; last if beta is not 1, except for delta)",
        ("best", "last"),
        "optimization",
    )

    images: int = option(
        5000, "test images of the evaluation at the end, a fixed random subset", POSITIVE_INTEGER, "evaluation"
    )
    evaluation_particles: int = option(
        200, "importance samples per image of that evaluation", POSITIVE_INTEGER, "evaluation"
    )
    dequantization_draws: int = _rare(
        16, "without effect: masses of levels are exact under every likelihood", POSITIVE_INTEGER, "evaluation"
    )

    seed: int = option(0, "of the weights, the noise and the order of images", NON_NEGATIVE_INTEGER, "run")
    device: str = option("auto", "auto (a GPU where there is one), cpu, cuda, cuda:1, ...", NOT_EMPTY, "run")
    compile: str = option("auto", "the training step as one compiled graph", COMPILES, "run")
    precision: str = _rare("float32", "of matrix products in training; tf32 needs an NVIDIA GPU", PRECISIONS, "run")
    stream: str = _rare(
        "auto",
        "bring each batch to the device on demand (auto: for data larger than half of its free memory)",
        ("auto", "on", "off"),
        "run",
    )
    checkpoint_seconds: float = _rare(60.0, "longest time between two checkpoints", NON_NEGATIVE, "run")
    tensorboard: str = _rare("off", "also write the numbers as TensorBoard events", ("off", "on"), "run")


# What a model and its data are, apart from how it is trained: a run that starts from another takes these from it.
MODEL_OPTIONS = tuple(spec.name for spec in fields(Options) if spec.metadata["group"] in ("data", "model"))


def default_objective(options: Options) -> str:
    """The default objective: the ELBO without the guide's score, unless the KL is closed-form, absent or expensive.

    Without the score a flow guide is inverted at every step: an autoregressive one took 6.6 times as long.
    """
    if options.labels is not None:
        return "semi-supervised"
    return "elbo" if options.kl == "analytic" or options.posterior in ("delta", "flow") else "stl"
