"""The options of every command: one dataclass each, and the table of commands. Free of torch.

The docstring of a dataclass is the command's help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, NamedTuple, Self, TypeVar

from ppl_vae.data import SPLITS
from ppl_vae.parts.registry import LIKELIHOODS, NETWORKS
from ppl_vae.runs.options import (
    BOOLEAN,
    COMPILES,
    MODEL_OPTIONS,
    NON_NEGATIVE_INTEGER,
    NOT_EMPTY,
    PLAIN,
    POSITIVE,
    POSITIVE_INTEGER,
    PRECISIONS,
    REQUIRED,
    CheckedOptions,
    Options,
    format_flag,
    option,
)

SIDES = ("top", "bottom", "left", "right")
AIS_STARTS = ("guide", "prior", "normal")
RUN = "a run folder, or a pretrained run: its name, or hf://USER/NAME on the Hugging Face Hub"

T = TypeVar("T")


class Command(NamedTuple):
    """A command: "module:function" below ``ppl_vae``, called with the options and ``say``, and the options' class."""

    target: str
    options: type


# --- Options that several commands have ---


def _split(default: T, text: str = "whose images") -> T:
    return option(default, text, SPLITS)


def _images(default: T) -> T:
    text = "a fixed random subset of that many images" + ("" if default else " (default: all)")
    return option(default, text, POSITIVE_INTEGER)


def _compile() -> str:
    return option("auto", "evaluate with a compiled graph (auto: where that pays)", COMPILES)


def _draws() -> int | None:
    return option(None, "without effect: masses of levels are exact under every likelihood", POSITIVE_INTEGER)


def _particles(default: int) -> int:
    return option(default, "importance samples per image", POSITIVE_INTEGER)


def _same(name: str, default: T = REQUIRED) -> T:
    """An option of train with the same help, check and group, and possibly another default."""
    spec = next(spec for spec in fields(Options) if spec.name == name)
    check = spec.metadata["choices"] or spec.metadata["check"]
    found: T = spec.default if default is REQUIRED else default  # type: ignore[assignment]
    return option(found, spec.metadata["help"], check, group=spec.metadata["group"], rare=spec.metadata["rare"])


@dataclass(frozen=True)
class _MovedData(CheckedOptions):
    _: KW_ONLY
    dataset: str | None = option(None, "the run's own data, where it has moved", group="data")
    data_dir: str | None = option(None, "folder of the named data sets, where it has moved", group="data")


@dataclass(frozen=True)
class _RunWithData(_MovedData):
    run_dir: str = option(REQUIRED, RUN, positional=True)


@dataclass(frozen=True)
class _Seeded(CheckedOptions):
    _: KW_ONLY
    device: str = option("auto", "auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    seed: int = option(0, "of every random draw", NON_NEGATIVE_INTEGER)


# --- The commands ---


CHANGES = ("epochs", "dataset", "data_dir", "compile")  # the options that may change when a run is resumed
QUICK = {"epochs": 3, "images": 1000}  # what --quick stands for


@dataclass(frozen=True)
class Train:
    """Train a VAE, estimate its log-likelihood, and draw its figures, in one folder."""

    options: Options
    run_dir: str | None = option(
        None, "the run's new folder (default: under runs/, by data, likelihood and time)", group="run"
    )
    resume: str | None = option(
        None, "go on with this run folder; only --epochs, --dataset, --data-dir and --compile may change", group="run"
    )
    quick: bool = option(
        False, f"a first look in a minute: --epochs {QUICK['epochs']} --images {QUICK['images']}", BOOLEAN, group="run"
    )
    changes: Mapping[str, Any] = field(default_factory=dict)  # of a run that is resumed

    @classmethod
    def make(cls, *, run_dir: str | None = None, resume: str | None = None, quick: bool = False, **values: Any) -> Self:
        """Makes the options from the given ones. Raises ValueError for one that a resumed run cannot change."""
        if resume is None:
            values = (QUICK if quick else {}) | values
            return cls(_continue_from_run(values) if "start_from" in values else Options(**values), run_dir)
        others = [format_flag(name) for name in values if name not in CHANGES]
        others += ["--run-dir"] * bool(run_dir) + ["--quick"] * quick
        if others:
            expected = ", ".join(map(format_flag, CHANGES))
            raise ValueError(f"--resume: expected no other option than {expected}, got {', '.join(others)}")
        return cls(Options(), resume=resume, changes=values)


def _continue_from_run(given: dict[str, Any]) -> Options:
    """The model and data options of the run that training starts from, replaced by the given ones."""
    from ppl_vae.runs.load import find_run_folder, read_config  # needs torch

    try:
        folder = find_run_folder(str(given["start_from"]))
        options, _ = read_config(folder)
    except ValueError as error:
        raise ValueError(f"--start-from: {error}") from None
    given = given | {"start_from": str(folder)}
    other = {name: getattr(options, name) for name in MODEL_OPTIONS}
    for part in ("prior", "posterior"):  # another one has other options
        if given.get(part, other[part]) != other[part]:
            other = {name: value for name, value in other.items() if not name.startswith(f"{part}_")}
    return Options(**(other | given))


@dataclass(frozen=True)
class Evaluate(_Seeded, _RunWithData):
    """Estimate a run's log p(x) by importance sampling, with its errors."""

    split: str = _split("test")
    num_particles: int = _particles(5000)
    images: int | None = _images(None)
    dequantization_draws: int | None = _draws()
    compile: str = _compile()


@dataclass(frozen=True)
class Certify(_Seeded, _RunWithData):
    """Bound a run's log p(x) from both sides, and find where nats are lost."""

    split: str = _split("test")
    images: int = _images(200)
    simulated: int = option(50, "images simulated by the model, for the upper bound", NON_NEGATIVE_INTEGER)
    temperatures: int = option(1000, "temperatures of annealed importance sampling", POSITIVE_INTEGER)
    leapfrogs: int = option(2, "leapfrog steps per Hamiltonian transition", POSITIVE_INTEGER)
    chains: int = option(16, "chains per image", POSITIVE_INTEGER)
    start: str = option("guide", "distribution that is annealed to p(z | x)", AIS_STARTS)
    num_particles: int = _particles(5000)
    gap_images: int = option(100, "training and validation images whose gap is split", NON_NEGATIVE_INTEGER)
    simulations: int = option(1000, "simulations for the guide's calibration", NON_NEGATIVE_INTEGER)
    draws: int = option(199, "samples of the guide that each simulation is ranked among", POSITIVE_INTEGER)
    against: str | None = option(None, "another data set, whose test images are scored too", group="data")
    against_data_dir: str | None = option(None, "where --against is", group="data")
    output: str | None = option(None, "JSON file of certificates to which this one is added")
    compile: str = _compile()


@dataclass(frozen=True)
class CompareRuns(_Seeded, _MovedData):
    """Compare runs on the same images: paired differences of log p(x)."""

    run_dirs: tuple[str, ...] = option(REQUIRED, "run folders; each is compared with the first", positional=True)
    split: str = _split("test")
    num_particles: int = _particles(200)
    images: int | None = _images(5000)
    dequantization_draws: int | None = _draws()
    compile: str = _compile()
    output: str | None = option(None, "a new folder for the result (default: under runs/, by the time)")


@dataclass(frozen=True)
class Sample(_Seeded, _RunWithData):
    """Draw images from a run, as arrays and pictures."""

    num_samples: int = option(64, "number of images", POSITIVE_INTEGER)
    output: str | None = option(None, "folder of the results (default: samples in the run's folder)")


_IMAGES_HELP = "an .npz or .npy file, an image, a folder of images; or test, validation or train: that split"


@dataclass(frozen=True)
class Encode(_Seeded, _RunWithData):
    """Compute latents and log p(x) of images under a run."""

    images_path: str = option(REQUIRED, _IMAGES_HELP, positional=True)
    num_particles: int = _particles(200)
    images: int | None = _images(None)
    output: str | None = option(None, "folder of the results (default: encodings/IMAGES in the run's folder)")


@dataclass(frozen=True)
class Impute(_Seeded, _RunWithData):
    """Estimate log p of the observed pixels and draw the missing ones."""

    images_path: str = option(REQUIRED, _IMAGES_HELP, positional=True)
    mask: str | None = option(None, "an .npy file, 1 where a pixel is observed and 0 where it is missing")
    hide: str | None = option(None, "hide half of each image", SIDES)
    num_particles: int = _particles(1000)
    num_draws: int = option(10, "samples of the missing pixels of each image", POSITIVE_INTEGER)
    images: int | None = _images(None)
    output: str | None = option(None, "folder of the results (default: imputations in the run's folder)")


@dataclass(frozen=True)
class Compress(_RunWithData):
    """Write images of a run as a file of about -log2 p(x) bits."""

    split: str = _split("test")
    images: int | None = _images(None)
    num_particles: int = option(1, "K of importance-weighted bits-back; more is shorter and slower", POSITIVE_INTEGER)
    seed: int = option(0, "of the initial bits, and of a binarization that draws anew", NON_NEGATIVE_INTEGER)
    output: str | None = option(None, "the file (default: SPLIT.bits in the run's folder)")


@dataclass(frozen=True)
class Decompress(CheckedOptions):
    """Decode a file of compressed images."""

    file: str = option(REQUIRED, "a file that compress wrote", positional=True)
    output: str | None = option(None, "an .npy file of the images (default: FILE.npy)")
    run_dir: str | None = option(None, "the run, where it has moved")


@dataclass(frozen=True)
class Diagnose(_Seeded, _RunWithData):
    """Say what went right or wrong in a run, with evidence and a cure."""

    split: str | None = _split(None, "whose images (default: validation, or test where there is none)")
    images: int | None = _images(2000)


@dataclass(frozen=True)
class Report(_RunWithData):
    """Write one HTML page about a run."""

    output: str | None = option(None, "the page's file (default: report.html in the run's folder)")


@dataclass(frozen=True)
class Figures(_RunWithData):
    """Draw a run's figures again from its files."""


@dataclass(frozen=True)
class Export(CheckedOptions):
    """Export a run as one folder to share, with a model card."""

    run_dir: str = option(REQUIRED, RUN, positional=True)
    output: str | None = option(None, "a new or empty folder (default: exports/ and the run's name)")
    push: str | None = option(None, "also upload it to the Hugging Face Hub, as USER/NAME", NOT_EMPTY)


@dataclass(frozen=True)
class _Table(CheckedOptions):
    """Options of a table of plain VAEs that one command trains."""

    dataset: str = _same("dataset")
    data_dir: str | None = _same("data_dir")
    image_size: tuple[int, ...] | None = _same("image_size")
    fit: str = _same("fit")
    color: str | None = _same("color")
    compile: str = _same("compile")
    images: int = _same("images")
    num_particles: int = _particles(100)
    run_dir: str | None = option(None, "folder of the run folders (default: below runs/, by the data set)")
    output: str | None = option(None, "JSON file of the table")

    def make_run_options(self) -> Options:
        """The options of each run of the table, a plain VAE, apart from what the table compares."""
        known = {spec.name for spec in fields(Options)} - {"num_particles"}
        shared = {name: value for name, value in vars(self).items() if name in known}
        return Options(**(PLAIN | shared | {"evaluation_particles": self.num_particles}))


@dataclass(frozen=True)
class CompareLikelihoods(_Table):
    """Train the same plain VAE under each likelihood, and compare them on one scale."""

    likelihoods: tuple[str, ...] | None = option(
        None, "which ones, all on one scale (default: all that fit the data and have its scale)", LIKELIHOODS
    )
    network: str = _same("network")
    hidden: tuple[int, ...] | None = _same("hidden")
    channels: tuple[int, ...] = _same("channels")
    latent_dim: int = _same("latent_dim")
    epochs: int = _same("epochs", 10)
    batch_size: int = _same("batch_size")
    learning_rate: float = _same("learning_rate", PLAIN["learning_rate"])
    dequantization_draws: int = _same("dequantization_draws")
    device: str = _same("device")
    seed: int = _same("seed")


@dataclass(frozen=True)
class CompareNetworks(_Table):
    """Train a plain VAE of each network for the same time, and compare them."""

    networks: tuple[str, ...] = option(
        tuple(word for word in NETWORKS if word != "tanh"), "which ones", NETWORKS
    )  # tanh is mlp with the activation of older papers
    likelihood: str = _same("likelihood")
    minutes: float = option(2.0, "of training for each network, planned by its first epochs", POSITIVE)


@dataclass(frozen=True)
class Reproduce(_Seeded):
    """Train a published model and hold it against the number in print."""

    name: str | None = option(None, "a recipe; --list names them", positional=True)
    list: bool = option(False, "name the recipes and exit", BOOLEAN)
    table: bool = option(False, "print the rows so far as a table and exit", BOOLEAN)
    epochs_share: float | None = option(None, "fraction of the recipe's epochs, which its row mentions", POSITIVE)
    epochs: int | None = option(None, "epochs of all stages together, in place of the recipe's", POSITIVE_INTEGER)
    precision: str | None = option(None, "of matrix products in training (default: the recipe's)", PRECISIONS)
    data_dir: str | None = _same("data_dir")
    run_dir: str | None = option(None, "folder of the run folders (default: runs/reproduce/NAME-seedN)")
    output: str = option("runs/reproduce/reproductions.json", "JSON file of the rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is None and not (self.list or self.table):
            raise ValueError("NAME: expected a recipe, got none; --list names them")
        if self.epochs is not None and self.epochs_share is not None:
            raise ValueError("--epochs: expected it without --epochs-share, got both")


@dataclass(frozen=True)
class RunStudy(CheckedOptions):
    """Train and measure some thirty models, and report what they show."""

    quick: bool = option(False, "fewer and shorter runs: minutes instead of an hour", BOOLEAN)
    output: str | None = option(None, "the study's folder (default: runs/study, or runs/study-quick)")
    datasets: tuple[str, ...] = option(
        ("mnist", "fashion-mnist"), "data sets; the first is studied in every part", NOT_EMPTY
    )
    data_dir: str | None = _same("data_dir")


COMMANDS = {
    "train": Command("commands.train:run", Train),
    "evaluate": Command("commands.evaluate:evaluate_run", Evaluate),
    "certify": Command("commands.certify:certify_run", Certify),
    "compare": Command("commands.compare_runs:compare_runs", CompareRuns),
    "compare-likelihoods": Command("commands.run_series:run_likelihoods", CompareLikelihoods),
    "compare-networks": Command("commands.run_series:run_networks", CompareNetworks),
    "diagnose": Command("commands.report:diagnose_run", Diagnose),
    "report": Command("commands.report:report_run", Report),
    "figures": Command("commands.report:draw_run", Figures),
    "sample": Command("commands.latents:sample_run", Sample),
    "encode": Command("commands.latents:encode_images", Encode),
    "impute": Command("commands.latents:impute_images", Impute),
    "compress": Command("commands.compress:compress_run", Compress),
    "decompress": Command("commands.compress:decompress_file", Decompress),
    "reproduce": Command("commands.reproduce:run", Reproduce),
    "study": Command("study.run:run", RunStudy),
    "export": Command("commands.report:export_run", Export),
}
