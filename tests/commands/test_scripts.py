"""The scripts end to end, as a user runs them, on a small part of MNIST: runs, resumptions, and what goes wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disturbed_runs import ENVIRONMENT, SCRIPTS, Done, Server, without_times
from matplotlib.image import imread
from small_run import contents

import ppl_vae
from ppl_vae import data
from ppl_vae.runs.options import PLAIN, format_flag

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="commands are not forked")

TRAIN, EVALUATE, FIGURES = "train_svi.py", "evaluate_log_likelihood.py", "make_figures.py"
PLAIN_WORDS = [word for name, value in PLAIN.items() for word in (format_flag(name), str(value))]
# Without a warm-up the guide of so short a run stays wide, and importance weights keep a variance.
SMALL = """
    --hidden 16 --latent-dim 2 --epochs 2 --images 20 --evaluation-particles 10 --warmup-epochs 0
""".split()  # noqa: SIM905 (read as it is typed)
SMALL = PLAIN_WORDS + SMALL
TABLE_FIGURES = ["latents.png", "log_likelihoods.png", "particles.png", "training_curves.png"]
IMAGE_FIGURES = ["interpolations.png", "manifold.png", "prior_samples.png", "reconstructions.png", "traversals.png"]
EVALUATION = ["evaluation.json", "evaluation-test.safetensors"]
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a script with these words in an empty folder."""
    return partial(server.run, cwd=tmp_path_factory.mktemp("cwd"))


# --- Runs that several tests share: they copy them, and change only their copies ---


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.npz, a few of MNIST's images, and bits.npy and gray.npy, tables."""
    folder = tmp_path_factory.mktemp("data")
    mnist = data.load("mnist")
    np.savez(
        folder / "small.npz",
        train=mnist.train[:300, 0].numpy(),
        valid=mnist.validation[:40, 0].numpy(),
        test=mnist.test[:50, 0].numpy(),
    )
    np.save(folder / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)).astype(np.uint8))
    np.save(folder / "gray.npy", (mnist.train[:400, 0, 6:22:2, 6:22:2].flatten(1)).numpy())
    return folder


@pytest.fixture(scope="module")
def first(server: Server, datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run from start to end, its data given by a relative path; and how it ended."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, server.run(TRAIN, "--dataset", "small.npz", "--run-dir", folder, *SMALL, cwd=datasets)


@pytest.fixture
def copy(first: tuple[Path, Done], tmp_path: Path) -> Path:
    """A finished run, to be changed."""
    return Path(shutil.copytree(first[0], tmp_path / "copy"))


def read(path: Path) -> Any:
    """Strict JSON, without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path.name} holds {word}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: imread(path) for path in (folder / "figures").iterdir()}


# --- A run ---


def test_a_run_leaves_the_files_of_a_run_folder(first):
    folder, done = first
    assert (done.code, done.said) == (0, [])
    assert f"--resume {folder} goes on" in done.out
    assert set(contents(folder)) == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "training_state.safetensors",
        "training_state.previous.safetensors",
        *EVALUATION,
        *(f"figures/{name}" for name in [*IMAGE_FIGURES, *TABLE_FIGURES]),
    }
    environment = read(folder / "environment.json")
    assert {"argv", "python", "packages", "device", "threads", "git_commit", "git_dirty", "time"} <= environment.keys()
    # 300 images in batches of 100 are 3 steps per epoch.
    assert [(record["step"], record["epoch"]) for record in records(folder)] == [(3, 1), (6, 2)]


def test_config_holds_what_was_asked_for_and_leaves_no_choice_open(first, datasets):
    """Only options that a file of arrays has no use for, or that are absent by default, are null."""
    options = read(first[0] / "config.json")["options"]
    asked = {"hidden": [16], "latent_dim": 2, "epochs": 2, "images": 20, "evaluation_particles": 10}
    assert asked.items() <= options.items()
    assert options["dataset"] == str(datasets / "small.npz")
    unused = {"data_dir", "image_size", "color", "classes", "labels"}
    absent = {"upper_latents", "start_from", "skip_norm"}
    assert {name for name, value in options.items() if value is None} == unused | absent


@pytest.mark.parametrize("name", [*IMAGE_FIGURES, *TABLE_FIGURES])
def test_a_figure_shows_something(first, name):
    assert pictures(first[0])[name].std() > 0.01


# --- Evaluation ---


@pytest.fixture(scope="module")
def evaluated(
    first: tuple[Path, Done], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Done]:
    """The first run with its whole test split evaluated by 3,000 particles; the new entry; and how the script ended."""
    folder = Path(shutil.copytree(first[0], tmp_path_factory.mktemp("runs") / "evaluated"))
    done = run(EVALUATE, folder, "--num-particles", "3000")
    return folder, read(folder / "evaluation.json")["test"], done


@pytest.mark.thorough
def test_the_log_likelihood_that_is_written_is_the_integral_over_z(evaluated, datasets):
    """log p(x) = log int N(z; 0, I) p(x | z) dz by the midpoint rule over two dimensions, on the published draw."""
    folder, entry, _ = evaluated
    stream = np.random.RandomState(777)
    with np.load(datasets / "small.npz") as arrays:
        stream.binomial(1, arrays["valid"].astype(np.float32) / 255)
        x = torch.from_numpy(stream.binomial(1, arrays["test"].astype(np.float32) / 255)).float()[:, None]
    width = 0.1
    axis = torch.arange(-6 + width / 2, 6, width)
    z = torch.cartesian_prod(axis, axis)
    log_p_z = -z.double().square().sum(-1) / 2 - math.log(2 * math.pi)
    with torch.no_grad():
        logits = ppl_vae.load(folder).likelihood(z).base_dist.logits.double().flatten(1)
    x = x.double().flatten(1)
    log_p_x_given_z = x @ logits.T - torch.nn.functional.softplus(logits).sum(-1)
    exact = (log_p_z + log_p_x_given_z).logsumexp(-1) + 2 * math.log(width)
    assert entry["num_images"] == len(exact)
    error = entry["log_likelihood"]["mean"] - float(exact.mean())
    assert abs(error) < 4 * entry["monte_carlo_stderr"] + entry["bias"]
    assert entry["log_likelihood"]["stderr"] == pytest.approx(float(exact.std() / math.sqrt(len(exact))), rel=0.02)


@pytest.mark.thorough
def test_an_evaluation_of_another_split_replaces_only_its_own_key(copy, run):
    before = read(copy / "evaluation.json")
    for particles in (5, 7):
        assert run(EVALUATE, copy, "--split", "validation", "--num-particles", particles).code == 0
    after = read(copy / "evaluation.json")
    assert set(after) == {"test", "validation"}
    assert after["test"] == before["test"]
    assert (after["validation"]["num_particles"], after["validation"]["num_images"]) == (7, 40)


@pytest.mark.thorough
def test_an_evaluation_changes_its_own_files_alone(first, copy, run):
    run(EVALUATE, copy, "--num-particles", "7")
    assert contents(copy, but=EVALUATION) == contents(first[0], but=EVALUATION)


# --- Resumption ---


@pytest.mark.thorough
def test_a_finished_run_says_so_and_is_left_as_it_is(first, copy, run):
    done = run(TRAIN, "--resume", copy)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{copy} is finished: 2 epochs, evaluated and drawn. --epochs extends it.\n"
    assert contents(copy) == contents(first[0])


@pytest.fixture(scope="module")
def extended(first: tuple[Path, Done], run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The first run, extended by two epochs; and how that ended."""
    folder = Path(shutil.copytree(first[0], tmp_path_factory.mktemp("runs") / "extended"))
    return folder, run(TRAIN, "--resume", folder, "--epochs", "4")


@pytest.mark.thorough
def test_an_extended_run_keeps_what_it_had_and_goes_on(first, extended):
    assert records(extended[0])[:2] == records(first[0])
    assert [record["step"] for record in records(extended[0])] == [3, 6, 9, 12]


@pytest.mark.thorough
def test_an_extended_run_has_its_new_epochs_in_its_config(first, extended):
    expected = read(first[0] / "config.json")
    expected["options"]["epochs"] = 4
    assert read(extended[0] / "config.json") == expected


@pytest.mark.thorough
def test_a_run_killed_before_its_evaluation_is_evaluated_without_training(first, copy, run):
    for name in EVALUATION:
        (copy / name).unlink()
    done = run(TRAIN, "--resume", copy)
    assert (done.code, done.said, "Trained" in done.out) == (0, [], False)
    expected = read(first[0] / "evaluation.json")["test"]
    assert without_times(read(copy / "evaluation.json")["test"]) == without_times(expected)
    changed = [*EVALUATION, *TABLE_FIGURES, "environment.json"]
    assert contents(copy, but=changed) == contents(first[0], but=changed)


def same_as_uninterrupted(folder: Path, whole: Path) -> None:
    """The same weights bit for bit, metrics, evaluation and figures."""
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [without_times(r) for r in records(folder)] == [without_times(r) for r in records(whole)]
    evaluations = [without_times(read(where / "evaluation.json")["test"]) for where in (folder, whole)]
    assert evaluations[0] == evaluations[1]
    assert set(pictures(folder)) == set(pictures(whole))
    for name in set(pictures(folder)) & set(IMAGE_FIGURES):
        np.testing.assert_array_equal(pictures(folder)[name], pictures(whole)[name], err_msg=name)


LEARNS = [*PLAIN_WORDS, "--hidden", "16", "--latent-dim", "2", "--epochs", "2", "--warmup-epochs", "0"]
LEARNS += ["--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def uninterrupted(datasets: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a gray table whose weights are the best at its end, so that older ones are wrong."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(TRAIN, "--dataset", datasets / "gray.npy", "--run-dir", folder, *LEARNS).code == 0
    assert read(folder / "evaluation.json")["test"]["step"] == records(folder)[-1]["step"]
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("files", range(1, 11))
def test_a_run_killed_once_any_number_of_its_files_is_in_place_goes_on_as_if_it_was_not(
    uninterrupted, datasets, run, tmp_path, files
):
    """Config, environment, metrics, two checkpoints of two files each, the older one's new name, evaluation, figure."""
    words = ["--dataset", datasets / "gray.npy", "--run-dir", tmp_path / "run", *LEARNS]
    assert run(TRAIN, *words, dies_after=files).code == 9
    done = run(TRAIN, "--resume", tmp_path / "run")
    assert (done.code, done.said) == (0, [])
    same_as_uninterrupted(tmp_path / "run", uninterrupted)


@pytest.mark.thorough
def test_an_interrupted_run_stops_without_a_traceback_and_has_its_weights(datasets, tmp_path):
    words = ["--dataset", "bits.npy", "--run-dir", str(tmp_path / "run"), *SMALL, "--epochs", "1000000"]
    with subprocess.Popen(
        [sys.executable, str(SCRIPTS / TRAIN), *words],
        cwd=datasets,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        patience = time.monotonic() + 120
        while not (tmp_path / "run" / "model.safetensors").exists() and time.monotonic() < patience:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    (line,) = Done(process.returncode, out, err).said
    assert process.returncode == 130
    assert re.fullmatch(rf"interrupted: stopped at step [\d,]+; --resume {tmp_path / 'run'} goes on", line)
    assert ppl_vae.load(tmp_path / "run").likelihood.event_shape == (16,)


# --- What goes wrong: one line, a non-zero exit, no traceback ---


def refusal(done: Done) -> str:
    """The one line that a command that was refused says."""
    assert "Traceback" not in done.err
    assert (len(done.said), done.code) == (1, 1), done.err
    assert done.said[0].startswith("error: ")
    return done.said[0]


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    value = read(path)
    change(value)
    path.write_text(json.dumps(value))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def set_option(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", lambda config: config["options"].update({name: value}))


def set_data(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", lambda config: config["data"].update({name: value}))


RESUME = "train_svi.py --resume"
EVERY = (EVALUATE, FIGURES, RESUME)
BAD_RUNS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    "missing": (shutil.rmtree, EVERY, r"config\.json: no such file; is .* a run folder\?"),
    "no config": (remove("config.json"), EVERY, r"config\.json: no such file"),
    "config no JSON": (write("config.json", "{'options'"), EVERY, r"config\.json: damaged: not JSON"),
    "an unknown option": (set_option("sparkle", 1), EVERY, r"config\.json: .*unknown ones: sparkle"),
    "an option out of range": (set_option("latent_dim", 0), EVERY, r"config\.json: --latent-dim: expected .*, got 0"),
    "a wrong event shape": (set_data("event_shape", [784]), (EVALUATE, FIGURES), r"(?i)shape"),
    "no weights yet": (remove("model.safetensors"), (EVALUATE, FIGURES), r"the run in .* has no weights yet"),
    "truncated weights": (truncate("model.safetensors"), (EVALUATE, FIGURES), r"model\.safetensors: damaged"),
    "evaluation damaged": (write("evaluation.json", "{"), (EVALUATE, RESUME), r"evaluation\.json: damaged: not JSON"),
    "evaluation a list": (write("evaluation.json", "[]"), (EVALUATE, RESUME), r"evaluation\.json: damaged: .* list"),
    "damaged metrics": (
        lambda folder: write("metrics.jsonl", "oops\n" + (folder / "metrics.jsonl").read_text())(folder),
        (FIGURES,),
        r"metrics\.jsonl: damaged: line 1",
    ),
    "data gone": (set_option("dataset", "/no/such.npz"), EVERY, r"/no/such\.npz, is not there; --dataset says"),
}


def words(command: str, folder: Path) -> list[str]:
    return [*command.split(), str(folder)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("what", "command"), [(what, command) for what, (_, commands, _) in BAD_RUNS.items() for command in commands]
)
def test_a_bad_run_folder_is_refused_in_one_line(copy, run, what, command):
    damage, _, message = BAD_RUNS[what]
    damage(copy)
    assert re.search(message, refusal(run(*words(command, copy))))


@pytest.mark.thorough
@pytest.mark.parametrize("command", EVERY)
def test_data_that_has_changed_since_training_is_refused(copy, run, datasets, tmp_path, command):
    with np.load(datasets / "small.npz") as arrays:
        changed = {name: arrays[name].copy() for name in arrays.files}
    changed["test"][0, 0, 0] ^= 1
    np.savez(tmp_path / "small.npz", **changed)
    set_option("dataset", str(tmp_path / "small.npz"))(copy)
    line = refusal(run(*words(command, copy)))
    assert "expected the data that" in line
    assert "SHA-256 differs" in line


DEVICES = ["cuda:99", "gpu", "meta", "hpu", "privateuseone", "CPU"]


@pytest.mark.thorough
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_here_is_refused_before_a_folder_is_made(datasets, run, tmp_path, device):
    done = run(TRAIN, "--dataset", datasets / "small.npz", "--run-dir", tmp_path / "run", "--device", device)
    assert "error: --device: expected a device" in refusal(done)
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_ends_in_one_line(datasets, run, tmp_path):
    done = run(
        TRAIN, "--dataset", datasets / "small.npz", "--run-dir", tmp_path / "run", *SMALL, "--learning-rate", "1e30"
    )
    assert re.search("error: step [0-9]+: ", refusal(done))
