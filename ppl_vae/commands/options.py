"""The options of every command: one dataclass each, and the table of commands. Free of torch."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ppl_vae.data.registry import SPLITS
from ppl_vae.parts.registry import LIKELIHOODS, NETWORKS
from ppl_vae.runs.fields import (
    BOOLEAN,
    NON_NEGATIVE_INTEGER,
    NOT_EMPTY,
    POSITIVE,
    POSITIVE_INTEGER,
    CheckedOptions,
    format_flag,
    option,
)
from ppl_vae.runs.options import COMPILES, PLAIN, PRECISIONS, Options, model_options

SIDES = ("top", "bottom", "left", "right")
AIS_STARTS = ("guide", "prior", "normal")


@dataclass(frozen=True)
class Command:
    """A command: what it does, its options, and the function that runs it.

    Args:
        target: "module:function", the module below ``ppl_vae``; the function takes the options and ``say``.
        options: The dataclass of its options.
        help: What it does, in one sentence.
    """

    target: str
    options: type
    help: str


def _run_dir() -> Any:
    return option(MISSING, "a run folder, or the name of a pretrained run", positional=True)


def _dataset() -> Any:
    return option(None, "the run's own data, where it has moved", group="data")


def _data_dir() -> Any:
    return option(None, "folder of the named data sets, where it has moved", group="data")


def _split(default: str | None = "test") -> Any:
    text = "whose images" if default else "whose images (default: validation, or test where there is none)"
    return option(default, text, SPLITS)


def _images(default: int | None) -> Any:
    text = "a fixed random subset of that many images" + ("" if default else " (default: all)")
    return option(default, text, POSITIVE_INTEGER)


def _device() -> Any:
    return option("cpu", "cpu, cuda, cuda:1, ...")


def _seed(text: str) -> Any:
    return option(0, text, NON_NEGATIVE_INTEGER)


def _compile() -> Any:
    return option("auto", "evaluate with a compiled graph (auto: where that pays)", COMPILES)


def _draws() -> Any:
    return option(None, "without effect: masses of levels are exact under every likelihood", POSITIVE_INTEGER)


def _particles(default: int) -> Any:
    return option(default, "importance samples per image", POSITIVE_INTEGER)


def _same(name: str, default: Any = MISSING) -> Any:
    """An option of train with the same help, check and group, and possibly another default."""
    spec = next(spec for spec in fields(Options) if spec.name == name)
    check = spec.metadata["choices"] or spec.metadata["check"]
    default = spec.default if default is MISSING else default
    return option(default, spec.metadata["help"], check, group=spec.metadata["group"], rare=spec.metadata["rare"])


@dataclass(frozen=True)
class Train:
    """Options of a new run, or the folder of one to go on with."""

    options: Options
    run_dir: str | None = option(
        None, "the run's new folder (default: under runs/, by data, likelihood and time)", group="run"
    )
    resume: str | None = option(
        None, "go on with this run folder; only --epochs, --dataset, --data-dir and --compile may change", group="run"
    )
    changes: dict[str, Any] | None = None  # what --resume changes

    MAY_CHANGE = ("epochs", "dataset", "data_dir", "compile")

    @classmethod
    def from_given(cls, given: dict[str, Any]) -> Train:
        """Makes the options from the given ones. Raises ValueError for one that a resumed run cannot change."""
        run_dir, resume = given.pop("run_dir", None), given.pop("resume", None)
        if resume is None:
            options = _continue_from_run(given) if "start_from" in given else Options(**given)
            return cls(options, run_dir)
        others = [format_flag(name) for name in given if name not in cls.MAY_CHANGE] + ["--run-dir"] * bool(run_dir)
        if others:
            allowed = ", ".join(map(format_flag, cls.MAY_CHANGE))
            raise ValueError(f"--resume: expected no other option than {allowed}, got {', '.join(others)}")
        return cls(Options(), None, resume, given)


_PRETRAINED = Path(__file__).parents[1] / "pretrained"


class UnusableRun(ValueError):
    """The run that training should start from cannot be read."""


def _continue_from_run(given: dict[str, Any]) -> Options:
    """The model and data options of the run that training starts from, replaced by the given ones."""
    folder = Path(given["start_from"])
    shipped = _PRETRAINED / folder
    if len(folder.parts) == 1 and not folder.exists() and (shipped / "config.json").exists():
        folder, given = shipped, given | {"start_from": str(shipped)}
    path = folder / "config.json"
    try:
        other = model_options(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise UnusableRun(f"--start-from: expected a run folder, but {path} cannot be read") from None
    except ValueError as error:  # JSON's errors, and those of bytes that are no text
        raise UnusableRun(f"{path}: damaged: {error}") from None
    for part in ("prior", "posterior"):  # another one has other options
        if given.get(part, other[part]) != other[part]:
            other = {name: value for name, value in other.items() if not name.startswith(f"{part}_")}
    return Options(**(other | given))


@dataclass(frozen=True)
class Evaluate(CheckedOptions):
    """Options of an evaluation."""

    run_dir: str = _run_dir()
    split: str = _split()
    num_particles: int = _particles(5000)
    images: int | None = _images(None)
    dequantization_draws: int | None = _draws()
    device: str = _device()
    seed: int = _seed("of the importance samples, and of the test images under --protocol iwae")
    compile: str = _compile()
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class Certify(CheckedOptions):
    """Options of a certificate."""

    run_dir: str = _run_dir()
    split: str = _split()
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
    device: str = _device()
    seed: int = _seed("of every sample")
    compile: str = _compile()
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class CompareRuns(CheckedOptions):
    """Options of a paired comparison of runs."""

    run_dirs: tuple[str, ...] = option(MISSING, "run folders; each is compared with the first", positional=True)
    split: str = _split()
    num_particles: int = _particles(200)
    images: int | None = _images(5000)
    dequantization_draws: int | None = _draws()
    device: str = _device()
    seed: int = _seed("of the importance samples")
    compile: str = _compile()
    output: str | None = option(None, "a new folder for the result (default: under runs/, by the time)")
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class Sample(CheckedOptions):
    """Options of sampling."""

    run_dir: str = _run_dir()
    num_samples: int = option(64, "number of images", POSITIVE_INTEGER)
    device: str = _device()
    seed: int = _seed("of the samples")
    output: str | None = option(None, "folder of the results (default: samples in the run's folder)")
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


_IMAGES_HELP = "an .npz or .npy file, an image, a folder of images; or test, validation or train: that split"


@dataclass(frozen=True)
class Encode(CheckedOptions):
    """Options of encoding images."""

    run_dir: str = _run_dir()
    images_path: str = option(MISSING, _IMAGES_HELP, positional=True)
    num_particles: int = _particles(200)
    images: int | None = _images(None)
    device: str = _device()
    seed: int = _seed("of the importance samples and of the binarization")
    output: str | None = option(None, "folder of the results (default: encodings/IMAGES in the run's folder)")
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class Impute(CheckedOptions):
    """Options of imputing missing pixels."""

    run_dir: str = _run_dir()
    images_path: str = option(MISSING, _IMAGES_HELP, positional=True)
    mask: str | None = option(None, "an .npy file, 1 where a pixel is observed and 0 where it is missing")
    hide: str | None = option(None, "hide half of each image", SIDES)
    num_particles: int = _particles(1000)
    num_draws: int = option(10, "samples of the missing pixels of each image", POSITIVE_INTEGER)
    images: int | None = _images(None)
    device: str = _device()
    seed: int = _seed("of the particles, the samples and the binarization")
    output: str | None = option(None, "folder of the results (default: imputations in the run's folder)")
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class Diagnose(CheckedOptions):
    """Options of a diagnosis."""

    run_dir: str = _run_dir()
    split: str | None = _split(None)
    images: int | None = _images(2000)
    device: str = _device()
    seed: int = _seed("of every sample")
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class Report(CheckedOptions):
    """Options of a run's report."""

    run_dir: str = _run_dir()
    output: str | None = option(None, "the page's file (default: report.html in the run's folder)")
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class Figures(CheckedOptions):
    """Options of drawing a run's figures."""

    run_dir: str = _run_dir()
    dataset: str | None = _dataset()
    data_dir: str | None = _data_dir()


@dataclass(frozen=True)
class Export(CheckedOptions):
    """Options of an export."""

    run_dir: str = _run_dir()
    output: str | None = option(None, "a new or empty folder (default: exports/ and the run's name)")


@dataclass(frozen=True)
class CompareLikelihoods(CheckedOptions):
    """Options of the table of likelihoods."""

    likelihoods: tuple[str, ...] | None = option(
        None, "which ones, all on one scale (default: all that fit the data and have its scale)", LIKELIHOODS
    )
    dataset: str = _same("dataset")
    data_dir: str | None = _same("data_dir")
    image_size: tuple[int, ...] | None = _same("image_size")
    fit: str = _same("fit")
    color: str | None = _same("color")
    network: str = _same("network")
    hidden: tuple[int, ...] | None = _same("hidden")
    channels: tuple[int, ...] = _same("channels")
    latent_dim: int = _same("latent_dim")
    epochs: int = _same("epochs", 10)
    batch_size: int = _same("batch_size")
    learning_rate: float = _same("learning_rate", PLAIN["learning_rate"])
    compile: str = _same("compile")
    images: int = _same("images")
    dequantization_draws: int = _same("dequantization_draws")
    num_particles: int = _particles(100)
    device: str = _device()
    seed: int = _same("seed")
    run_dir: str | None = option(None, "folder of the run folders (default: runs/likelihoods-DATASET)")
    output: str | None = option(None, "JSON file of the table")

    def make_run_options(self) -> Options:
        """The options of each run of the table, a plain VAE, apart from its likelihood."""
        own = ("likelihoods", "num_particles", "run_dir", "output")
        shared = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name not in own}
        return Options(**(PLAIN | shared | {"evaluation_particles": self.num_particles}))


@dataclass(frozen=True)
class CompareNetworks(CheckedOptions):
    """Options of the table of networks."""

    networks: tuple[str, ...] = option(
        tuple(word for word in NETWORKS if word != "tanh"), "which ones", NETWORKS
    )  # tanh is mlp with the activation of older papers
    dataset: str = _same("dataset")
    data_dir: str | None = _same("data_dir")
    image_size: tuple[int, ...] | None = _same("image_size")
    fit: str = _same("fit")
    color: str | None = _same("color")
    likelihood: str = _same("likelihood")
    minutes: float = option(2.0, "of training for each network, planned by its first epochs", POSITIVE)
    compile: str = _same("compile")
    images: int = _same("images")
    num_particles: int = _particles(100)
    run_dir: str | None = option(None, "folder of the run folders (default: runs/networks-DATASET)")
    output: str | None = option(None, "JSON file of the table")

    def make_run_options(self) -> Options:
        """The options of each run of the table, a plain VAE, apart from its network and epochs."""
        own = ("networks", "minutes", "num_particles", "run_dir", "output")
        shared = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name not in own}
        return Options(**(PLAIN | shared | {"evaluation_particles": self.num_particles}))


@dataclass(frozen=True)
class Reproduce(CheckedOptions):
    """Options of reproducing a published model."""

    name: str | None = option(None, "a recipe; --list names them", positional=True)
    list: bool = option(False, "name the recipes and exit", BOOLEAN)
    table: bool = option(False, "print the rows so far as a table and exit", BOOLEAN)
    epochs_share: float | None = option(None, "fraction of the recipe's epochs, which its row mentions", POSITIVE)
    epochs: int | None = option(None, "epochs of all stages together, in place of the recipe's", POSITIVE_INTEGER)
    precision: str | None = option(None, "of matrix products in training (default: the recipe's)", PRECISIONS)
    device: str = _device()
    seed: int = _seed("of the training")
    data_dir: str | None = _same("data_dir")
    run_dir: str | None = option(None, "folder of the run folders (default: runs/reproduce/NAME-seedN)")
    output: str = option("scripts/results/reproductions.json", "JSON file of the rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is None and not (self.list or self.table):
            raise ValueError("NAME: expected a recipe, got none; --list names them")
        if self.epochs is not None and self.epochs_share is not None:
            raise ValueError("--epochs: expected it without --epochs-share, got both")


@dataclass(frozen=True)
class RunStudy(CheckedOptions):
    """Options of the study."""

    quick: bool = option(False, "fewer and shorter runs: minutes instead of an hour", BOOLEAN)
    output: str | None = option(None, "the study's folder (default: runs/study, or runs/study-quick)")
    datasets: tuple[str, ...] = option(
        ("mnist", "fashion-mnist"), "data sets; the first is studied in every part", NOT_EMPTY
    )
    data_dir: str | None = _same("data_dir")


COMMANDS = {
    "train": Command(
        "commands.train:run", Train, "Train a VAE, estimate its log-likelihood, and draw its figures, in one folder."
    ),
    "evaluate": Command(
        "commands.evaluate:evaluate_run", Evaluate, "Estimate a run's log p(x) by importance sampling, with its errors."
    ),
    "certify": Command(
        "commands.certify:certify_run", Certify, "Bound a run's log p(x) from both sides, and find where nats are lost."
    ),
    "compare": Command(
        "commands.compare_runs:compare_runs",
        CompareRuns,
        "Compare runs on the same images: paired differences of log p(x).",
    ),
    "compare-likelihoods": Command(
        "commands.compare_likelihoods:run",
        CompareLikelihoods,
        "Train the same plain VAE under each likelihood, and compare them on one scale.",
    ),
    "compare-networks": Command(
        "commands.compare_networks:run",
        CompareNetworks,
        "Train a plain VAE of each network for the same time, and compare them.",
    ),
    "diagnose": Command(
        "commands.diagnose:diagnose_run", Diagnose, "Say what went right or wrong in a run, with evidence and a cure."
    ),
    "report": Command("commands.report:report_run", Report, "Write one HTML page about a run."),
    "figures": Command("commands.report:draw_run", Figures, "Draw a run's figures again from its files."),
    "sample": Command("commands.sample:sample_run", Sample, "Draw images from a run, as arrays and pictures."),
    "encode": Command("commands.encode:encode_images", Encode, "Compute latents and log p(x) of images under a run."),
    "impute": Command(
        "commands.impute:impute_images", Impute, "Estimate log p of the observed pixels and draw the missing ones."
    ),
    "reproduce": Command(
        "commands.reproduce:run", Reproduce, "Train a published model and hold it against the number in print."
    ),
    "study": Command("study.run:run", RunStudy, "Train and measure some fifty VAEs, and report what they show."),
    "export": Command("commands.export:export_run", Export, "Export a run as one folder to share, with a model card."),
}
