"""The study: every part of it on small images, and that it goes on where it was interrupted."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from small_run import bars
from torch import Tensor, nn
from torch.distributions import Normal

from ppl_vae import VAE, Conditional, capture, data, objectives, runs
from ppl_vae.experiment.evaluation import read_per_image
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.networks import MLP
from ppl_vae.options import Options
from ppl_vae.posteriors import DiagonalNormal
from ppl_vae.priors import StandardNormal
from ppl_vae.study import plan, run
from ppl_vae.study.material import components
from ppl_vae.study.plan import DEFAULT, QUICK, Size
from ppl_vae.study.quality import frechet, frechet_distance
from ppl_vae.study.run import collect
from ppl_vae.study.scale_maps import gradients_at_start
from ppl_vae.study.training import FAILURE, MeanOverPixels, averaged

TINY = Size(
    epochs=1,
    collapse_epochs=1,
    stress_epochs=1,
    betas={"bars": (0.1, 1.0, 100.0)},
    seeds=(1,),
    close_betas=(1.0,),
    latent_dims=(2,),
    networks=("mlp",),
    images=100,
    num_particles=10,
)
SECTIONS = ("mean", "sweep", "collapse", "autoencoder", "regularization", "architectures", "scale_maps", "explorers")


def silent(line: str) -> None:
    pass


def save_gray_bars(path: Path) -> Path:
    """8 x 8 images of 8-bit levels: bars on a gray ground, in two classes."""
    arrays = {}
    for seed, (split, count) in enumerate((("train", 300), ("valid", 100), ("test", 120))):
        images, labels = bars(count, seed=seed)
        noise = np.random.default_rng(seed).integers(0, 40, images.shape)
        arrays[split], arrays[f"{split}_labels"] = (200 * images + noise).astype(np.uint8), labels
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def bars_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gray_bars(tmp_path_factory.mktemp("data") / "bars.npz")


class Killed(RuntimeError):
    """What stands for a process that was killed."""


def made(folder: Path, dataset: Path, size: Size = TINY) -> dict[str, Any]:
    path = collect(size, [str(dataset)], name="tiny", output=str(folder), say=silent)
    return json.loads(path.read_text(encoding="utf-8"))


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
            made(folder, bars_file)
    return folder, made(folder, bars_file)


@pytest.fixture(scope="module")
def numbers(study: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return study[1]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds") and k != "environment"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


# --- The whole ---


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_there(numbers: dict[str, Any], section: str) -> None:
    assert numbers[section]


def test_every_planned_run_has_its_record(numbers: dict[str, Any]) -> None:
    assert list(numbers["runs"]) == [each.name for each in plan.plan(TINY, ["bars"])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, bars_file: Path) -> dict[str, Any]:
    """The first seven runs of the same study, in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plan", lambda *args, **kwargs: plan.plan(*args, **kwargs)[:7])
        return made(tmp_path_factory.mktemp("whole"), bars_file)


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
    assert without_times(made(study[0], bars_file)) == without_times(study[1])


def test_a_folder_with_a_study_of_another_size_is_refused(study: tuple[Path, dict[str, Any]], bars_file: Path) -> None:
    with pytest.raises(ValueError, match="expected a study like this one, got the tiny study of bars"):
        made(study[0], bars_file, replace(TINY, epochs=2))


def test_a_folder_with_something_else_is_refused(tmp_path: Path, bars_file: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder, or that of a study"):
        made(tmp_path, bars_file)


def test_runs_with_other_options_are_refused(
    study: tuple[Path, dict[str, Any]], bars_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "bars-beta-1").mkdir(parents=True)
    config = (study[0] / "runs" / "bars-beta-1" / runs.CONFIG).read_text(encoding="utf-8")
    (tmp_path / "runs" / "bars-beta-1" / runs.CONFIG).write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="others in epochs"):
        made(tmp_path, bars_file, replace(TINY, epochs=2))


def test_data_that_cannot_be_read_is_told_of_before_any_training(tmp_path: Path, bars_file: Path) -> None:
    with pytest.raises(ValueError, match=r"--datasets .*missing.npz: .*; --datasets .*bars.npz does without"):
        collect(TINY, [str(bars_file), str(tmp_path / "missing.npz")], name="x", output=str(tmp_path / "s"), say=silent)
    assert not (tmp_path / "s").exists()


def test_a_table_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.random.default_rng(0).random((200, 5), dtype=np.float32))
    with pytest.raises(ValueError, match="expected images, got"):
        made(tmp_path / "s", tmp_path / "table.npy")


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


def test_the_peak_is_the_highest_mean(numbers: dict[str, Any]) -> None:
    sweep = numbers["sweep"]["bars"]
    for of in ("log_likelihood", "elbo"):
        best = max(sweep["rows"], key=lambda row: row[of]["mean"])
        assert sweep["peaks"][of]["beta"] == best["beta"]
        assert best["beta"] in sweep["peaks"][of]["not_distinguishable"]


def test_a_condition_is_as_predicted_where_all_latents_die_below_the_threshold(numbers: dict[str, Any]) -> None:
    for each in numbers["mean"]["bars"]["conditions"]:
        live = sum(value > each["threshold"] for value in numbers["mean"]["bars"]["eigenvalues"])
        assert each["predicted_live"] == live
        assert each["as_predicted"] == ((live == 0) == (each["active"] == 0))


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


def test_the_parts_of_the_blur_add_up(numbers: dict[str, Any]) -> None:
    parts = numbers["autoencoder"]["bars"]["decomposition"]
    error = parts["posterior_noise"]["mean"] + parts["autoencoder_error"]["mean"] + parts["lost"]["mean"]
    assert parts["error"]["mean"] == pytest.approx(error, rel=1e-6)


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
    row = made(copy, bars_file)["scale_maps"]["stressed"][1]
    assert (row["finished"], row["step"], row["failure"]) == (False, 2, "step 2: site 'z': NaN")


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


def test_principal_components_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7)
    found = components(torch.from_numpy(x).reshape(50, 1, 2, 3), most=4)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    np.testing.assert_allclose(found.scale.numpy(), values[:4] / math.sqrt(50), rtol=1e-9)


def test_exp_overflows_where_the_bounded_map_does_not() -> None:
    x = torch.rand(20, 1, 8, 8).round()
    rows = gradients_at_start(Options(network="mlp", hidden=(16,), latent_dim=4), x)
    at_most = {row["scale_map"]: row for row in rows if row["largest_feature"] == 100}
    assert at_most["exp"]["kl_overflow"] > 0
    assert at_most["exp"]["largest_scale"] is math.inf or at_most["exp"]["largest_scale"] > 1e30
    assert at_most["bounded"]["kl_overflow"] == 0
    assert max(at_most[word]["largest_scale"] for word in ("bounded", "softplus")) < 1100


def test_a_gradient_that_is_finite_has_a_norm() -> None:
    x = torch.rand(20, 1, 8, 8).round()
    rows = gradients_at_start(Options(network="mlp", hidden=(16,), latent_dim=4), x)
    finite = [row for row in rows if row["not_finite"] == 0]
    assert len(finite) >= 9  # all maps but at 100
    assert all(math.isfinite(row["gradient_norm"]["mean"]) for row in finite)


def test_short_runs_are_compiled_where_many_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "why_not", lambda device: None)
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
