"""Results of the commands: one frozen dataclass each, and their form in JSON files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.diagnostics.likelihood import PixelCalibration
from ppl_vae.diagnostics.measurement import Measurements
from ppl_vae.diagnostics.verdicts import Verdict
from ppl_vae.evidence.estimate import Estimate, combine_stderrs
from ppl_vae.evidence.importance import Importance
from ppl_vae.runs.files import JsonObject, read_json

T = TypeVar("T")


def to_json(result: object) -> Any:
    """The form of a result in a JSON file.

    A dataclass becomes an object, a tuple or tensor a list, and an ``Estimate`` its mean and stderr.

    >>> to_json(Quantiles(median=1.0, q05=0.5, q95=2.0))
    {'median': 1.0, 'q05': 0.5, 'q95': 2.0}
    """
    if isinstance(result, Estimate):
        return result.to_json()
    if is_dataclass(result):
        return {spec.name: to_json(getattr(result, spec.name)) for spec in fields(result)}
    if isinstance(result, Mapping):
        return {key: to_json(value) for key, value in result.items()}
    if isinstance(result, Tensor):
        return result.tolist()
    return [to_json(value) for value in result] if isinstance(result, list | tuple) else result


def from_json(kind: type[T], values: object) -> T:
    """A result from the object that ``to_json`` made of it, where unknown keys are ignored.

    JSON has no NaN: a ``float`` that is null there becomes NaN. Raises ValueError for a missing key or another type.

    >>> from_json(Quantiles, {"median": 1, "q05": None, "q95": 2.0})
    Quantiles(median=1.0, q05=None, q95=2.0)
    """
    return _decode(kind, values, kind.__name__)


def read_rows(path: Path, key: str, kind: type[T]) -> list[T]:
    """The list of results under a key of a JSON file; none if there is no file. Raises ValueError for a damaged one."""
    if not path.exists():
        return []
    rows = read_json(path).get(key)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: damaged: expected a list of {key}")
    return [_from_file(path, kind, row) for row in rows]


def _from_file(path: Path, kind: type[T], values: object, advice: str = "") -> T:
    try:
        return from_json(kind, values)
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}{advice}") from None


def _decode(kind: Any, value: Any, name: str) -> Any:
    """A JSON value as the type of a field. ``name`` is the field's place, for messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind is Tensor and isinstance(value, list) and all(each is None or type(each) in (int, float) for each in value):
        return torch.tensor([math.nan if each is None else each for each in value], dtype=torch.double)
    if origin in (Union, UnionType):
        if type(value) in arguments:
            return value
        inner = [argument for argument in arguments if argument is not NoneType]
        if len(inner) == 1:
            return _decode(inner[0], value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        hints, specs = get_type_hints(kind), fields(kind)
        for spec in specs:
            if spec.name not in value and spec.default is MISSING and spec.default_factory is MISSING:
                raise ValueError(f"{name}: expected the key {spec.name!r}, which is missing")
        names = [spec.name for spec in specs if spec.name in value]
        make: Any = kind
        return make(**{each: _decode(hints[each], value[each], f"{name}.{each}") for each in names})
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(_decode(*each, f"{name}[{i}]") for i, each in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], each, f"{name}[{key!r}]") for key, each in value.items()}
    if kind is float and (value is None or type(value) in (int, float)):
        return math.nan if value is None else float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


@dataclass(frozen=True)
class Quantiles:
    """The median of a number per image, and the values that 5% and 95% of the images are below.

    None where the number is not known for any image.
    """

    median: float | None
    q05: float | None
    q95: float | None

    @classmethod
    def compute(cls, values: Tensor) -> Quantiles:
        """Quantiles of (n,) numbers, without those that are NaN."""
        known = values[~values.isnan()]
        if not len(known):
            return cls(None, None, None)
        return cls(*(float(known.quantile(share, interpolation="lower")) for share in (0.5, 0.05, 0.95)))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a number in nats depends on besides the model, in words of the command line where it has them."""

    dataset: str
    protocol: str
    binarization: str
    likelihood: str
    transform: str
    measure: str  # "mass" or "density"
    pixels: str  # how training saw pixels, a word of ``data.PIXELS``
    scale: str  # what the nats measure, such as "mass of binary pixels"; only numbers on one scale can be compared


@dataclass(frozen=True, kw_only=True)
class ImportanceSummary:
    """The means over images of what S particles say of each image. Nats per image; None for an autoencoder."""

    elbo: Estimate | None = None  # E_q[log p(x, z) - log q(z | x)]
    monte_carlo_stderr: float | None = None  # the particles' part of the error of the mean L_S, by the delta method
    bias: float | None = None  # what L_S lacks of log p(x) by the jackknife
    rise: float | None = None  # what ten times the particles gained, L_S - L_{S/10}
    ess: Quantiles | None = None  # effective sample size of the particles
    pareto_k: Quantiles | None = None  # k-hat of the importance weights
    unreliable_images: int | None = None  # those whose jackknife bias is large (``importance.UNRELIABLE_BIAS``)


def summarize_importance(found: Importance, num_particles: int) -> ImportanceSummary:
    """The summary of fields (N,) of single images. A single particle shows no unreliable images."""
    return ImportanceSummary(
        elbo=Estimate.mean_of(found.elbo, num_particles),
        monte_carlo_stderr=combine_stderrs(found.monte_carlo_stderr),
        bias=float(found.bias.mean()),
        rise=float(found.tenfold_gain.mean()),
        ess=Quantiles.compute(found.ess),
        pareto_k=Quantiles.compute(found.pareto_k),
        unreliable_images=int(found.unreliable().sum()) if num_particles > 1 else None,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation(ImportanceSummary, Provenance):
    """log p(x) of the images of one split: an entry of evaluation.json. Nats per image.

    An autoencoder has no density. Its evaluation holds the reconstruction alone, and None for every other estimate.
    """

    split: str
    num_images: int
    num_particles: int | None
    seed: int
    dequantization_draws: int | None = None  # always None, since masses of levels are exact
    log_likelihood: Estimate | None = None  # the importance-weighted bound L_S
    reconstruction: Estimate  # E_q[log p(x | z)]; log p(x | z(x)) for an autoencoder
    kl: Estimate | None = None  # KL(q(z | x) || p(z))
    floor: Estimate | None = None  # log p(x) of independent pixels with maximum-likelihood marginals of training images
    binarization_entropy: float | None = None  # mean entropy of the binarization's draw, where one was made
    bits_per_dim: Estimate | None = None  # -log2 P(x) / D for 8-bit levels
    step: int  # of the weights
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LabelledEvaluation(Evaluation):
    """The evaluation of a model of labelled images. log p(x) sums p(x | y) over the labels exactly.

    The classifier is p(y | x) = p(y) p(x | y) / p(x), with the frequencies of the known training labels as p(y). Nats
    per image.
    """

    log_likelihood_given_label: Estimate  # log p(x | y) for the image's label y, the bound L_S
    elbo_given_label: Estimate
    accuracy: Estimate  # the share of images whose most probable label is their own
    log_prob_label: Estimate  # log p(y | x) of the image's label
    confusion: tuple[tuple[int, ...], ...]  # images of each class (row) that are taken for each class (column)
    class_probs: tuple[float, ...]  # p(y)
    class_names: tuple[str, ...]
    classifier_accuracy: Estimate | None = None  # that of q(y | x), the classifier of a semi-supervised model


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Provenance):
    """The diagnosis of a run on images of a split: diagnosis.json. The worst verdict is the first."""

    step: int
    split: str
    seed: int
    numbers: Measurements
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, kw_only=True)
class RunCalibration(PixelCalibration):
    """The calibration of a run's test pixels: calibration.json."""

    step: int
    split: str
    seed: int


DIAGNOSIS = "diagnosis.json"


def read_evaluation(folder: Path, split: str = "test") -> Evaluation | None:
    """The evaluation of a split in evaluation.json; None where there is none. Raises ValueError for a damaged one."""
    entry = runs.read_evaluations(folder).get(split)
    return None if entry is None else _from_file(folder / runs.EVALUATION, _evaluation_kind(entry), entry)


def read_entry(entry: object) -> Evaluation:
    """An evaluation from its entry of evaluation.json, an object; as ``from_json``."""
    return from_json(_evaluation_kind(entry), entry)


def _evaluation_kind(entry: object) -> type[Evaluation]:
    return LabelledEvaluation if isinstance(entry, Mapping) and "accuracy" in entry else Evaluation


def read_diagnosis(folder: Path) -> Diagnosis | None:
    """The diagnosis in diagnosis.json; None where there is none. Raises ValueError for a damaged one."""
    path = folder / DIAGNOSIS
    if not path.exists():
        return None
    return _from_file(path, Diagnosis, runs.read_json(path), "; ppl-vae diagnose makes it again")


def is_evaluated(folder: Path) -> bool:
    """Whether the test split was evaluated with the run's present weights, and the numbers of each image are whole."""
    entry = runs.read_evaluations(folder).get("test", {})
    if entry.get("step") != runs.load_step(folder / runs.MODEL):
        return False
    try:
        runs.load_tensors(folder / runs.per_image_file("test"))
    except ValueError:  # lost or damaged: the split is evaluated again
        return False
    return True


def find_last_gain(records: Sequence[JsonObject]) -> float | None:
    """max of the last tenth of a validation curve - max before, nats; None without two epochs of one. Source: ours.

    Args:
        records: Those of metrics.jsonl.
    """
    names = "validation_bound_nats_per_image", "validation_elbo_nats_per_image"
    curve = [value for record in records if (value := record.get(names[0], record.get(names[1]))) is not None]
    tenth = math.ceil(len(curve) / 10)
    return max(curve[-tenth:]) - max(curve[:-tenth]) if len(curve) > 1 else None


@dataclass(frozen=True)
class PerImage:
    """The evaluation of each image of a split."""

    index: Tensor  # (n,) int64, the images' places in their split, ascending
    result: Importance  # each field (n,) float64
    num_particles: int
    seed: int
    step: int  # of the weights


def read_per_image(folder: Path, split: str) -> PerImage | None:
    """The numbers of each image of the evaluation in evaluation.json.

    None where there is no such evaluation, where it is an autoencoder's (it has only reconstructions), where the run
    has other weights by now, or where an interrupted write left the two files with different evaluations. Raises
    ValueError for a damaged file.
    """
    path, entry = folder / runs.per_image_file(split), runs.read_evaluations(folder).get(split)
    if entry is None or not path.exists() or ("log_likelihood" in entry and entry["log_likelihood"] is None):
        return None
    try:
        tensors, scalars = runs.load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; ppl-vae evaluate {folder} --split {split} measures it again") from None
    try:
        result = Importance.from_tensors(tensors)
        stored = PerImage(tensors["index"], result, *(scalars[name] for name in ("num_particles", "seed", "step")))
    except KeyError as error:
        raise ValueError(f"{path}: damaged: no {error} in it") from None
    told = tuple(entry.get(key) for key in ("num_images", "num_particles", "seed", "step"))
    found = (len(stored.index), stored.num_particles, stored.seed, stored.step)
    return stored if told == found and stored.step == runs.load_step(folder / runs.MODEL) else None
