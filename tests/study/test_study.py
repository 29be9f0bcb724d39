"""The study: every part of it on small images, and that it goes on where it was interrupted."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from disturbed_runs import end, held_elsewhere
from PIL import Image
from scipy import linalg
from small_study import TINY, run_tiny_study, save_gray_bars, silent, without_times
from torch import Tensor, nn
from torch.distributions import Normal

from ppl_vae import VAE, Conditional, data, objectives, runs
from ppl_vae.commands.options import RunStudy
from ppl_vae.diagnostics import verdicts
from ppl_vae.evidence.importance import IMPORTANCE_NAMES, Importance
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runs.evaluations import PerImage, read_per_image
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.resolve import load_splits
from ppl_vae.runtime import capture
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.study import measuring, pairs, plan, run, sections, training
from ppl_vae.study.material import components, material
from ppl_vae.study.plan import DEFAULT, QUICK, Size
from ppl_vae.study.quality import frechet, frechet_distance, frechet_excess_ratio, frechet_ratio, jackknife
from ppl_vae.study.run import collect
from ppl_vae.study.scale_maps import _of_one, gradients_at_start
from ppl_vae.study.training import FAILURE, MeanOverPixels, averaged, train_planned

SECTIONS = ("mean", "sweep", "collapse", "autoencoder", "regularization", "architectures", "scale_maps", "explorers")


@pytest.fixture(scope="module")
def bars_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gray_bars(tmp_path_factory.mktemp("data") / "bars.npz")


class Killed(RuntimeError):
    """What stands for a process that was killed."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, bars_file: Path) -> tuple[Path, dict[str, Any]]:
    """A whole study, which was killed in the middle of it, and went on."""
    folder = tmp_path_factory.mktemp("study") / "tiny"
    trained = []

    def killed_after_the_fifth(*args: Any, **kwargs: Any) -> bool:
        trained.append(train(*args, **kwargs))
        if len(trained) == 5:
            raise Killed
        return trained[-1]

    train = run.train_planned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train_planned", killed_after_the_fifth)
        with pytest.raises(Killed):
            run_tiny_study(folder, bars_file)
    return folder, run_tiny_study(folder, bars_file)


@pytest.fixture(scope="module")
def numbers(study: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return study[1]


# --- The whole ---


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_there(numbers: dict[str, Any], section: str) -> None:
    assert numbers[section]


def test_every_planned_run_has_its_record(numbers: dict[str, Any]) -> None:
    assert list(numbers["runs"]) == [each.name for each in plan.plan(TINY, ["bars"])]


def test_the_stored_study_is_of_the_plain_vaes_that_are_planned() -> None:
    path = Path(__file__).parents[2] / "scripts" / "results" / "study.json"
    stored = {name: record["options"] for name, record in json.loads(path.read_text(encoding="utf-8"))["runs"].items()}
    planned = {each.name: each.options for each in plan.plan(DEFAULT, RunStudy().datasets)}
    assert planned.keys() == stored.keys()
    for name, options in planned.items():
        assert {word: getattr(options, word) for word in stored[name]} == stored[name]
        untold = PLAIN.keys() - stored[name].keys()
        assert {word: getattr(options, word) for word in untold} == {word: PLAIN[word] for word in untold}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, bars_file: Path) -> dict[str, Any]:
    """The first seven runs of the same study, in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plan", lambda *args, **kwargs: plan.plan(*args, **kwargs)[:7])
        return run_tiny_study(tmp_path_factory.mktemp("whole"), bars_file)


def test_a_study_that_was_killed_ends_with_the_numbers_of_one_that_was_not(
    numbers: dict[str, Any], whole: dict[str, Any]
) -> None:
    killed = {name: numbers["runs"][name] for name in whole["runs"]}
    assert len(killed) == 7
    assert without_times(killed) == without_times(whole["runs"])
    assert without_times(numbers["sweep"]) == without_times(whole["sweep"])


def test_sections_without_their_runs_are_short(whole: dict[str, Any]) -> None:
    assert [row["run"] for row in whole["architectures"]["rows"]] == ["bars-beta-1"]
    assert whole["scale_maps"]["stressed"] == []
    assert whole["autoencoder"]["bars"]["same_code"]["neighbors"] is None


def test_a_finished_study_trains_and_measures_nothing_again(
    study: tuple[Path, dict[str, Any]], bars_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(run, "train_planned", never)
    monkeypatch.setattr("ppl_vae.study.measuring.measure", never)
    assert without_times(run_tiny_study(study[0], bars_file)) == without_times(study[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process is forked")
def test_a_folder_that_another_process_writes_to_is_refused(
    study: tuple[Path, dict[str, Any]], bars_file: Path
) -> None:
    child = held_elsewhere(study[0])
    try:
        with pytest.raises(ValueError, match=rf"but process {child} on "):
            run_tiny_study(study[0], bars_file)
    finally:
        end(child)


def test_a_folder_with_a_study_of_another_size_is_refused(study: tuple[Path, dict[str, Any]], bars_file: Path) -> None:
    with pytest.raises(ValueError, match="expected a study like this one, got the tiny study of bars"):
        run_tiny_study(study[0], bars_file, replace(TINY, epochs=2))


def test_a_folder_with_something_else_is_refused(tmp_path: Path, bars_file: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder, or that of a study"):
        run_tiny_study(tmp_path, bars_file)


def test_runs_with_other_options_are_refused(
    study: tuple[Path, dict[str, Any]], bars_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "bars-beta-1").mkdir(parents=True)
    config = (study[0] / "runs" / "bars-beta-1" / runs.CONFIG).read_text(encoding="utf-8")
    (tmp_path / "runs" / "bars-beta-1" / runs.CONFIG).write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="others in epochs"):
        run_tiny_study(tmp_path, bars_file, replace(TINY, epochs=2))


def test_data_that_cannot_be_read_is_told_of_before_any_training(tmp_path: Path, bars_file: Path) -> None:
    with pytest.raises(ValueError, match=r"--datasets .*missing.npz: .*; --datasets .*bars.npz does without"):
        collect(TINY, [str(bars_file), str(tmp_path / "missing.npz")], name="x", output=str(tmp_path / "s"), say=silent)
    assert not (tmp_path / "s").exists()


def test_a_table_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.random.default_rng(0).random((200, 5), dtype=np.float32))
    with pytest.raises(ValueError, match="expected images, got"):
        run_tiny_study(tmp_path / "s", tmp_path / "table.npy")


# --- Its numbers ---


def test_a_paired_difference_is_that_of_the_images(study: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = study
    row = numbers["sweep"]["bars"]["rows"][0]
    a, b = (read_per_image(folder / "runs" / name, "test") for name in ("bars-beta-1", row["run"]))
    assert a is not None
    assert b is not None
    d = (b.result.log_evidence - a.result.log_evidence).numpy()
    found = row["difference_log_likelihood"]
    assert found["mean"] == pytest.approx(d.mean(), rel=1e-9)
    assert found["stderr"] == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)), rel=1e-9)


N = 400


def evaluated(mean: float, *, rise: float, spread: float = 0.1, **changed: Any) -> PerImage:
    """L_S and the ELBO of N images, hard ones for all runs alike, which more particles would still raise."""
    torch.manual_seed(round(1000 * abs(mean)))
    noise = spread * torch.randn(N, dtype=torch.double)
    bound = torch.linspace(-150, -50, N, dtype=torch.double) + mean + noise - noise.mean()
    zero = torch.zeros(N, dtype=torch.double)
    fields = dict.fromkeys(IMPORTANCE_NAMES, zero)
    fields |= {"log_evidence": bound, "elbo": bound - 1, "rise": zero + rise}
    return PerImage(
        torch.arange(N), Importance.from_tensors(fields), **{"num_particles": 100, "seed": 0, "step": 1} | changed
    )


def peak_of(stored: dict[float, PerImage], of: str, patch: pytest.MonkeyPatch) -> pairs.Peak:
    folders = {beta: Path(f"{beta}") for beta in stored}
    patch.setattr(pairs, "per_image", lambda folder: stored[float(folder.name)])
    values = {beta: float(each.result.log_evidence.mean()) for beta, each in stored.items()}
    return pairs.peak(folders, values, of)


@pytest.fixture
def along_beta() -> dict[float, PerImage]:
    """A best one, one as good, one that its own rise may lift above the best, one that it may not, and one far off."""
    return {
        0.1: evaluated(-2, rise=3),
        0.5: evaluated(-2.001, rise=0.1),
        0.7: evaluated(0, rise=0.1),
        1.0: evaluated(-0.001, rise=0.1),
        2.0: evaluated(-10, rise=3),
    }


def test_a_run_that_may_still_rise_above_the_best_is_not_ranked_below_it(
    along_beta: dict[float, PerImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert peak_of(along_beta, "log_likelihood", monkeypatch) == pairs.Peak(0.7, [0.7, 1.0], [0.1])


def test_elbos_are_ranked_whatever_more_particles_would_gain(
    along_beta: dict[float, PerImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert peak_of(along_beta, "elbo", monkeypatch) == pairs.Peak(0.7, [0.7, 1.0], [])


def records_of(stored: dict[float, PerImage]) -> dict[float, Any]:
    return {
        beta: {
            "name": f"{beta}",
            "evaluation": {"reliable": True, "log_likelihood": {"mean": float(each.result.log_evidence.mean())}},
        }
        for beta, each in stored.items()
    }


@pytest.mark.parametrize("betas", [(0.1, 0.5, 0.7, 1.0, 2.0), (0.5, 0.7, 1.0, 2.0)])
def test_a_peak_is_reliable_only_where_all_others_are_ranked(
    along_beta: dict[float, PerImage], betas: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "per_image", lambda folder: along_beta[float(folder.name)])
    records = records_of({beta: along_beta[beta] for beta in betas})
    found = sections._peak({beta: Path(f"{beta}") for beta in betas}, records, "log_likelihood")
    assert found["reliable"] == found["ranks_log_likelihood"] == (0.1 not in betas)


@pytest.mark.parametrize("changed", [{"num_particles": 1000}, {"seed": 1}])
def test_evaluations_with_other_particles_or_another_seed_are_not_subtracted(
    changed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {"a": evaluated(0, rise=0), "b": evaluated(1, rise=0, **changed)}
    monkeypatch.setattr(pairs, "per_image", lambda folder: stored[folder.name])
    with pytest.raises(ValueError, match=f"b: expected an evaluation with {next(iter(changed))}"):
        pairs.difference(Path("b"), Path("a"), "elbo")


def seen_and_gray(bars_file: Path) -> tuple[np.ndarray, np.ndarray]:
    splits = data.load(str(bars_file))
    seen, gray = data.evaluation_images(splits, "train", "dynamic"), data.probabilities(splits, "train")
    return seen.flatten(1).double().numpy(), gray.flatten(1).double().numpy()


def test_directions_are_live_above_what_permuted_pixels_show(numbers: dict[str, Any], bars_file: Path) -> None:
    x, _ = seen_and_gray(bars_file)
    generator = np.random.default_rng(0)
    edge = np.linalg.eigvalsh(np.corrcoef(generator.permuted(x, axis=0).T))[-1]
    found = numbers["mean"]["bars"]
    assert found["edge"] == pytest.approx(edge, rel=0.1)
    live = int((np.linalg.eigvalsh(np.corrcoef(x.T)) > edge).sum())
    assert [each["predicted_live"] for each in found["conditions"] if each["condition"] == "sum"] == [live]


def test_no_direction_is_predicted_to_live_under_a_mean_over_pixels(numbers: dict[str, Any]) -> None:
    conditions = {each["condition"]: each for each in numbers["mean"]["bars"]["conditions"]}
    for name in ("mean", "beta-of-mean"):  # eigenvalues of correlations add up to D
        assert (conditions[name]["predicted_live"], conditions[name]["predicted_collapse"]) == (0, True)


def test_the_largest_eigenvalue_is_of_gray_pixels(numbers: dict[str, Any], bars_file: Path) -> None:
    seen, gray = seen_and_gray(bars_file)
    found = numbers["mean"]["bars"]["gaussian_variance"]
    assert found["largest_eigenvalue"] == pytest.approx(np.linalg.eigvalsh(np.cov(gray.T))[-1], rel=1e-6)
    assert found["largest_eigenvalue_as_seen"] == pytest.approx(np.linalg.eigvalsh(np.cov(seen.T))[-1], rel=1e-6)


@pytest.mark.parametrize("name", ["likelihood", "binarization", "version", "sha256"])
def test_eigenvalues_of_another_likelihood_or_binarization_are_not_taken(
    study: tuple[Path, dict[str, Any]], tmp_path: Path, bars_file: Path, name: str
) -> None:
    file = "noise-bars.json"
    stored = runs.read_json(study[0] / file)
    runs.write_json(tmp_path / file, stored | {"key": stored["key"] | {name: "other"}, "eigenvalues": [1.0]})
    options = plan.base(TINY, str(bars_file))
    anew: Any = SimpleNamespace(folder=tmp_path)
    found = sections.noise_of(anew, material(options, load_splits(options), TINY.images))
    assert found["eigenvalues"] == pytest.approx(stored["eigenvalues"])


def test_of_ten_tests_each_has_a_tenth_of_the_level() -> None:
    found = sections._rejected([0.004, 0.006, *[0.04] * 8])
    assert found == {"rejected": 1, "level": pytest.approx(0.005), "latent_dim": 10}


def test_eigenvalues_in_noise_units_are_those_of_the_pixels_correlations(
    numbers: dict[str, Any], bars_file: Path
) -> None:
    x = data.evaluation_images(data.load(str(bars_file)), "train", "dynamic").flatten(1).numpy()
    expected = np.linalg.eigvalsh(np.corrcoef(x.T))[::-1]
    np.testing.assert_allclose(numbers["mean"]["bars"]["eigenvalues"], expected, rtol=0.02)  # marginals are smoothed


def test_an_autoencoder_has_no_likelihood(numbers: dict[str, Any]) -> None:
    record = numbers["runs"]["bars-autoencoder"]
    assert record["evaluation"]["log_likelihood"] is None
    assert record["evaluation"]["elbo"] is None
    assert record["evaluation"]["reconstruction"]["mean"] < 0


@pytest.mark.parametrize("part", ["error", "posterior_noise", "bias"])
def test_the_parts_of_the_error_are_those_of_the_diagnosis_but_for_the_draws(
    numbers: dict[str, Any], part: str
) -> None:
    found = numbers["autoencoder"]["bars"]
    expected = found["vae"]["blur"][part]
    assert found["decomposition"][part]["mean"] == pytest.approx(expected["mean"], abs=2 * expected["stderr"])


def test_the_autoencoders_error_is_that_of_its_diagnosis(numbers: dict[str, Any]) -> None:
    found = numbers["autoencoder"]["bars"]
    expected = found["autoencoder"]["blur"]["error"]
    assert found["decomposition"]["autoencoder_error"] == pytest.approx(expected, rel=1e-4)


def test_the_error_of_what_is_lost_knows_that_the_images_are_the_same(numbers: dict[str, Any]) -> None:
    parts = numbers["autoencoder"]["bars"]["decomposition"]
    apart = math.hypot(parts["bias"]["stderr"], parts["autoencoder_error"]["stderr"])
    assert 0 < parts["lost"]["stderr"] < 0.9 * apart


def test_a_binary_image_has_the_variance_of_its_pixels_as_its_error(numbers: dict[str, Any], bars_file: Path) -> None:
    gray = data.probabilities(data.load(str(bars_file)), "test").double()
    found = numbers["autoencoder"]["bars"]["binarized"]
    assert abs(found["error"]["mean"] - float((gray * (1 - gray)).mean())) < 5 * found["error"]["stderr"]
    assert found["sharpness"]["mean"] > 1  # of noise


def test_every_picture_that_is_named_is_there_in_its_size(study: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = study
    rows = {"reconstructions": 1, "samples": 2, "interpolations": 4, "fitted_samples": 2}
    for record in numbers["runs"].values():
        for name, file in record["pictures"].items():
            with Image.open(folder / file) as picture:
                assert name == "holes" or picture.size == (80, 8 * rows[name])


def test_explorers_have_two_latents_and_the_vae_first(numbers: dict[str, Any]) -> None:
    assert [each["autoencoder"] for each in numbers["explorers"]] == [False, True]
    assert all(len(code) == 3 for each in numbers["explorers"] for code in each["codes"])


def test_a_training_that_met_a_nan_is_told_of_and_not_done_again(
    study: tuple[Path, dict[str, Any]], tmp_path: Path, bars_file: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study[0], copy)
    failed = copy / "runs" / "bars-stress-exp"
    for file in failed.iterdir():
        file.unlink()
    runs.write_json(failed / FAILURE, {"error": "step 2: site 'z': NaN"})
    row = run_tiny_study(copy, bars_file)["scale_maps"]["stressed"][1]
    assert (row["finished"], row["step"], row["failure"]) == (False, 2, "step 2: site 'z': NaN")
    assert row["failure_phase"] == "training"


def test_a_nan_of_an_evaluation_is_no_failure_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluates_to_nan(*args: Any, **kwargs: Any) -> None:
        (tmp_path / "mnist-beta-1").mkdir()
        raise NotFinite("log p(x | z): expected numbers, got NaN or +infinity")

    monkeypatch.setattr(training, "train_run", evaluates_to_nan)
    planned = plan.Planned("mnist-beta-1", plan.base(TINY, "mnist"))
    assert not train_planned(planned, tmp_path, say=silent)
    found = training.read_failure(tmp_path / planned.name)
    assert found == ("log p(x | z): expected numbers, got NaN or +infinity", "evaluation")


def measured_again(study: Path, bars_file: Path) -> dict[str, Any]:
    options = plan.base(TINY, str(bars_file), beta=1.0)
    planned = plan.Planned("bars-beta-1", options)
    of_bars = material(options, load_splits(options), TINY.images)
    return measuring.measured(
        planned, study / "runs" / planned.name, of_bars, in_full=True, pictures=study / "pictures"
    )


def test_a_measurement_with_other_constants_is_not_taken(
    study: tuple[Path, dict[str, Any]], bars_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*args: Any, **kwargs: Any) -> None:
        raise Killed

    monkeypatch.setattr(measuring, "measure", again)
    assert measured_again(study[0], bars_file)["name"] == "bars-beta-1"
    monkeypatch.setitem(measuring._CONSTANTS, "unreliable_bias", 0.25)
    with pytest.raises(Killed):
        measured_again(study[0], bars_file)


def test_whether_a_run_is_reliable_is_judged_by_the_thresholds_of_today(
    study: tuple[Path, dict[str, Any]], bars_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (1e3, -1e3):
        monkeypatch.setattr(verdicts, "MOST_RISE", most)
        monkeypatch.setattr(verdicts, "MOST_UNRELIABLE", 1.0)
        found.append(measured_again(study[0], bars_file)["evaluation"]["reliable"])
    assert found == [True, False]


# --- A mean over pixels ---


def linear_vae(D: int, L: int) -> VAE:
    torch.manual_seed(0)
    return VAE(
        StandardNormal(L),
        Conditional(MLP(L, D, hidden=()), Bernoulli((D,))),
        Conditional(MLP(D, 2 * L, hidden=()), DiagonalNormal(L)),
    )


def loss_and_gradient(vae: VAE, loss: Tensor) -> tuple[float, Tensor]:
    weights = [*vae.parameters()]
    return float(loss.detach()), nn.utils.parameters_to_vector(torch.autograd.grad(loss, weights))


def test_averaging_pixels_is_a_reconstruction_over_d_minus_the_kl() -> None:
    D, L = 12, 3
    vae, x = linear_vae(D, L).double(), torch.rand(5, D, dtype=torch.double).round()
    torch.manual_seed(1)
    found, gradient = loss_and_gradient(vae, averaged(objectives.elbo, D)(vae.model, vae.guide, x, beta=1.0))
    torch.manual_seed(1)
    encoder: Any = vae.posterior
    decoder: Any = vae.likelihood
    loc, feature = encoder.net(x).chunk(2, -1)
    scale = (7 * (feature / 7).tanh()).exp()
    z = loc + scale * torch.randn(5, L, dtype=torch.double)
    logits = decoder.net(z)
    reconstruction = (x * logits - nn.functional.softplus(logits)).sum(-1)
    kl = (Normal(loc, scale).log_prob(z) - Normal(0, 1).log_prob(z)).sum(-1)
    expected, expected_gradient = loss_and_gradient(vae, (kl - reconstruction / D).mean())
    assert found == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_averaging_pixels_has_the_gradient_of_beta_d_over_d() -> None:
    D = 12
    vae, x = linear_vae(D, 3).double(), torch.rand(5, D, dtype=torch.double).round()
    torch.manual_seed(1)
    _, of_mean = loss_and_gradient(vae, averaged(objectives.elbo, D)(vae.model, vae.guide, x, beta=1.0))
    torch.manual_seed(1)
    _, of_beta = loss_and_gradient(vae, objectives.elbo(vae.model, vae.guide, x, beta=float(D)))
    torch.testing.assert_close(of_mean * D, of_beta, rtol=1e-9, atol=1e-12)


def test_averaging_pixels_leaves_the_model_as_it_was() -> None:
    vae, x = linear_vae(6, 2), torch.ones(4, 6)
    torch.manual_seed(0)
    before = objectives.elbo(vae.model, vae.guide, x)
    MeanOverPixels(6)(vae.model)(x)
    torch.manual_seed(0)
    assert torch.equal(objectives.elbo(vae.model, vae.guide, x), before)


# --- Its measures ---


def test_the_frechet_distance_is_that_of_scipys_square_root() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(200, 4)), generator.normal(1, 2, size=(300, 4)) @ generator.normal(size=(4, 4))
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distances_error_is_that_over_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    repeats = [
        frechet(torch.randn(400, 3, generator=generator), 1 + torch.randn(400, 3, generator=generator))
        for _ in range(100)
    ]
    spread = torch.tensor([found.mean for found in repeats]).std()
    told = torch.tensor([found.stderr for found in repeats]).mean()
    assert float(told / spread) == pytest.approx(1, abs=0.25)  # the spread of 100 is known to 7%, its jackknife alike


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 1)))
    found = jackknife(lambda x: float(x.mean()), x)
    assert found.stderr == pytest.approx(float(x.std()) / math.sqrt(20), rel=1e-9)


def test_the_jackknife_knows_what_samples_share() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 1)))
    assert jackknife(lambda a, b: float(a.mean() - b.mean()), x, x + 1).stderr == pytest.approx(0, abs=1e-12)


def normal_points(seed: int, shift: float) -> Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(200, 30)))
    x[:, 0] += shift
    return x


def test_a_ratio_of_frechet_distances_is_right_less_the_floor() -> None:
    a, b, other, real = (normal_points(seed, shift) for seed, shift in enumerate((4.0, 2.0, 0.0, 0.0)))
    found = frechet_excess_ratio(a, b, other, real)
    assert found is not None
    assert abs(found.mean - 4) < 3 * found.stderr  # squares of the shifts
    assert found.stderr < 1


def test_a_ratio_of_frechet_distances_is_too_near_to_one_with_the_floor() -> None:
    a, b, _, real = (normal_points(seed, shift) for seed, shift in enumerate((4.0, 2.0, 0.0, 0.0)))
    found = frechet_ratio(a, b, real)
    assert 1 < found.mean < 4 - 3 * found.stderr


def test_nothing_is_divided_by_a_distance_that_is_not_above_the_floor() -> None:
    a, b, other, real = (normal_points(seed, shift) for seed, shift in enumerate((4.0, 0.0, 0.0, 0.0)))
    assert frechet_excess_ratio(a, b, other, real) is None


def test_principal_components_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7)
    found = components(torch.from_numpy(x).reshape(50, 1, 2, 3), most=4)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    np.testing.assert_allclose(found.scale.numpy(), values[:4] / math.sqrt(50), rtol=1e-9)


def test_exp_overflows_where_the_bounded_map_does_not() -> None:
    x = torch.rand(20, 1, 8, 8).round()
    rows = gradients_at_start(Options(**PLAIN, network="mlp", hidden=(16,), latent_dim=4), x)
    at_most = {row["scale_map"]: row for row in rows if row["largest_feature"] == 100}
    assert at_most["exp"]["kl_overflow"] > 0
    assert at_most["exp"]["largest_scale"] is math.inf or at_most["exp"]["largest_scale"] > 1e30
    assert at_most["bounded"]["kl_overflow"] == 0
    assert max(at_most[word]["largest_scale"] for word in ("bounded", "softplus")) < 1100


def test_a_gradient_that_is_finite_has_a_norm() -> None:
    x = torch.rand(20, 1, 8, 8).round()
    rows = gradients_at_start(Options(**PLAIN, network="mlp", hidden=(16,), latent_dim=4), x)
    finite = [row for row in rows if row["not_finite"] == 0]
    assert len(finite) >= 9  # all maps but at 100
    assert all(math.isfinite(row["gradient_norm"]["mean"]) for row in finite)


def test_gradients_of_both_kls_are_their_closed_forms_where_the_decoder_ignores_z() -> None:
    D, L = 12, 3
    vae, x = linear_vae(D, L), torch.rand(5, D).round()
    encoder: Any = vae.posterior
    decoder: Any = vae.likelihood
    for weights in decoder.parameters():
        nn.init.zeros_(weights)
    found = _of_one(vae, x, 2.0)
    loc, feature = (each.detach().double() for each in encoder.net(x).chunk(2, -1))
    feature = feature * 2 / feature.abs().max()
    scale, slope = (7 * (feature / 7).tanh()).exp(), 1 - (feature / 7).tanh().square()
    torch.manual_seed(0)
    noise = torch.randn(5, L).double()
    z = loc + scale * noise
    analytic, sampled = slope * (scale.square() - 1), slope * (z * scale * noise - 1)
    assert found["gradient_norm"]["mean"] == pytest.approx(float(analytic.norm(dim=-1).mean()), rel=1e-4)
    assert found["sampled"]["gradient_norm"]["mean"] == pytest.approx(float(sampled.norm(dim=-1).mean()), rel=1e-4)


def test_short_runs_are_compiled_where_many_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "capture_obstacle", lambda device: None)
    mnist: Any = SimpleNamespace(splits=SimpleNamespace(train=range(50_000), event_shape=(1, 28, 28)))
    found = run._compiled_where_it_pays(plan.plan(QUICK, ["mnist"]), {"mnist": mnist})
    compiled = {each.name for each in found if each.options.compile == "on"}
    assert compiled == {plan.sweep_name("mnist", beta) for beta in QUICK.betas_of("mnist")} | {
        "mnist-beta-of-mean",
        "mnist-gated-remedy-none",
    }


@pytest.mark.parametrize("size", [DEFAULT, QUICK])
def test_names_of_runs_are_unique(size: Size) -> None:
    names = [each.name for each in plan.plan(size, ["mnist", "fashion-mnist"])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("size", [DEFAULT, QUICK])
def test_each_sweep_has_nine_betas_or_more_on_mnist_from_a_thousandth_to_a_hundred(size: Size) -> None:
    betas = size.betas_of("mnist")
    assert len(betas) >= 9
    assert (min(betas), max(betas)) == (0.001, 100)
