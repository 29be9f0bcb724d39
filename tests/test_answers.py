"""The study's words: every number is read from study.json, and what they claim follows it."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from study_numbers import paired, study_numbers, value

from ppl_vae.study import answers as package
from ppl_vae.study.answers import answers
from ppl_vae.study.words import listed, number, percent, percent_plus_minus, plus_minus, signed

SECTIONS = ("mean", "sweep", "collapse", "autoencoder", "regularization", "architectures", "scale_maps")


def text(study: dict[str, Any]) -> str:
    """All that is said, in one line."""
    return " ".join(" ".join([answer.question, answer.short, *answer.long]) for answer in answers(study))


def said(study: dict[str, Any], key: str) -> str:
    """One answer, short and long."""
    found = next(answer for answer in answers(study) if answer.key == key)
    return " ".join([found.short, *found.long])


def changed(path: Sequence[Any], new: Any) -> dict[str, Any]:
    """study.json with one entry replaced."""
    study = study_numbers()
    place = study
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return study


# --- Every number is read ---


FILES = sorted(Path(package.__file__).parent.glob("*.py"))


def test_no_digit_is_typed_into_a_sentence():
    words = [word for path in FILES for word in _words(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(FILES) > 1
    assert len(words) > 100
    assert [word for word in words if re.search(r"\d", word)] == []


def _words(tree: ast.Module) -> list[str]:
    """The strings of a file, but for its documentation."""
    documentation = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]


def _has_docstring(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    return (
        isinstance(body, list)
        and bool(body)
        and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
    )


@pytest.mark.parametrize(
    ("path", "new", "words"),
    [
        ("sweep/mnist/rows/0/rate/mean", 123.75, "123.75 ± 0.25"),
        ("sweep/mnist/rows/-1/distortion/mean", 234.75, "234.75 ± 0.25"),
        ("sweep/mnist/rows/-1/variation/mean", 0.123, "vary 12.3 ± 0.4%"),
        ("sweep/mnist/rows/2/implied_beta/mean", 3.21, "3.210 ± 0.010 at beta = 1"),
        ("sweep/mnist/rows/2/gap/mean", 7.89, "7.89 ± 0.05"),
        ("sweep/mnist/peaks/log_likelihood/value/mean", -71.25, "-71.25 ± 0.25"),
        ("sweep/mnist/peaks/log_likelihood/difference_to_reference/mean", 2.75, "+2.75 ± 0.10"),
        ("sweep/fashion-mnist/peaks/elbo/value/mean", -312.5, "-312.50 ± 0.25"),
        ("sweep/mnist/seeds/1/log_likelihood/spread", 0.37, "0.37 nats"),
        ("mean/mnist/num_pixels", 1000, "the 1,000 pixels"),
        ("mean/mnist/eigenvalues/0", 76.5, "is 76.5;"),
        ("mean/mnist/num_eigenvalues", 800, "of 800 exceed"),
        ("mean/mnist/edge", 1.75, "sampling noise alone reaches, 1.75"),
        ("mean/mnist/gaussian_variance/mean_squared_error", 500.0, "a variance of 500 a pixel"),
        ("mean/mnist/gaussian_variance/largest_eigenvalue", 6.25, "the gray images' covariance, 6.25:"),
        ("mean/mnist/conditions/0/active", 17, "against 17 with the sum"),
        ("mean/mnist/conditions/1/variation/mean", 0.123, "vary 12.3 ± 0.4%"),
        ("mean/mnist/conditions/1/threshold", 900.0, "that of a mean is 900,"),
        ("mean/mnist/mean_equals_beta_of_mean/reconstruction/mean", 0.75, "+0.750 ± 0.020 nats"),
        ("collapse/networks/residual/rows/1/active", 33, "33 with a warm-up"),
        ("collapse/networks/residual/rows/2/difference_log_likelihood/mean", 88.5, "88.50 ± 0.10 nats"),
        ("collapse/networks/residual/rows/2/free_bits", 0.75, "0.75 nats each"),
        ("autoencoder/mnist/vae/sharpness/mean", 0.456, "0.456 ± 0.010"),
        ("autoencoder/mnist/sharper/mean", 1.77, "1.770 ± 0.020"),
        ("autoencoder/mnist/binarized/sharpness/mean", 2.375, "2.375 ± 0.020 times the gray"),
        ("autoencoder/mnist/binarized/error/mean", 0.0321, "0.03210 ± 0.00010 a pixel"),
        ("autoencoder/mnist/decomposition/shares/posterior_noise/mean", 0.345, "34.5 ± 1.0%"),
        ("autoencoder/mnist/decomposition/shares/lost/mean", 0.125, "12.5 ± 1.0%"),
        ("autoencoder/mnist/samples_worse/frechet/mean", 9.25, "9.25 ± 0.30 times"),
        ("autoencoder/mnist/samples_worse/frechet_uncorrected/mean", 4.25, "4.25 ± 0.20, is biased toward one"),
        ("autoencoder/mnist/samples_worse/classifier/mean", 0.625, "higher by 0.625 ± 0.020"),
        ("autoencoder/mnist/floor/frechet/mean", 0.475, "0.475 ± 0.020"),
        ("autoencoder/mnist/reconstruction_difference/mean", 13.25, "better by 13.25 ± 0.10"),
        ("autoencoder/mnist/latents/0/sharpness/mean", 0.125, "0.125 ± 0.010"),
        ("regularization/mnist/rows/2/classifier/effect/mean", 0.375, "effect 0.375 ± 0.020"),
        ("regularization/mnist/rows/2/kolmogorov_smirnov/rejected", 17, "rejects 17 of 40"),
        ("regularization/mnist/rows/2/kolmogorov_smirnov/max", 0.0625, "0.0625 in the worst latent"),
        ("regularization/mnist/rows/2/kolmogorov_smirnov/level", 0.0025, "p below 0.0025 each"),
        ("regularization/mnist/rows/2/holes/mean", 0.045, "4.5 ± 0.4%"),
        ("regularization/mnist/rows/2/mutual_information/mean", 5.75, "at least about 5.75"),
        ("regularization/mnist/rows/-1/classifier/effect/mean", 0.825, "0.825 ± 0.020"),
        ("architectures/rows/3/log_likelihood/mean", -81.25, "-81.25 ± 0.25"),
        ("architectures/rows/3/parameters", 876_543, "876,543"),
        ("scale_maps/gradients/5/not_finite", 0.75, "exp 75%"),
        ("scale_maps/gradients/5/sampled/not_finite", 0.25, "exp 25%"),
        ("scale_maps/stressed/1/step", 345, "at step 345 of 1,000"),
    ],
)
def test_the_text_follows_the_numbers(path, new, words):
    keys = [int(key) if re.fullmatch(r"-?\d+", key) else key for key in path.split("/")]
    assert words not in text(study_numbers())
    assert words in text(changed(keys, new))


# --- What they claim of peaks ---


def with_peak(**changes: Any) -> dict[str, Any]:
    """study.json with another peak of L_S on MNIST."""
    study = study_numbers()
    study["sweep"]["mnist"]["peaks"]["log_likelihood"] |= changes
    return study


def test_a_peak_that_is_not_distinguishable_is_called_so():
    study = with_peak(difference_to_reference=paired(0.1, 0.1, likelihood=True), not_distinguishable=[0.3, 1.0])
    assert "but is not distinguishable" not in said(study_numbers(), "peak")
    assert "against beta = 1, on the same images), but is not distinguishable from beta = 1." in said(study, "peak")


def test_a_peak_is_one_of_the_bound_whether_or_not_it_ranks_log_likelihoods():
    for unknown in (True, False, None):
        study = with_peak(ranks_log_likelihood=unknown)
        assert "On MNIST the bound L_S on log p(x) of test images is highest at beta = 0.3" in said(study, "peak")


def test_a_beta_that_may_yet_be_as_high_is_named():
    study = with_peak(ranks_log_likelihood=False, unranked=[0.01, 5.0], reliable=False)
    assert "at beta = 0.01 and 5 log p(x) itself may be as high" in said(study, "peak")
    assert "may be as high" not in said(study_numbers(), "peak")


def test_a_peak_whose_estimate_has_not_settled_is_not_certain():
    study = with_peak(reliable=False)
    assert "the peak of log p(x) is not certain" in said(study, "peak")
    assert "whether log p(x) does is not settled" in said(study, "peak").split("On Fashion-MNIST")[0]
    assert "the peak of log p(x) is not certain" not in said(study_numbers(), "peak")


def test_a_peak_at_the_end_of_the_sweep_is_called_so():
    assert "an end of the sweep" in said(with_peak(beta=100.0), "peak")


def test_peaks_of_both_bounds_are_compared():
    expected = "So the bound L_S peaks at a lower beta than the ELBO, beyond chance of the images"
    assert expected in said(study_numbers(), "peak")
    assert "is not settled" not in said(study_numbers(), "peak")
    bounds = changed(("sweep", "mnist", "peaks_ranked"), False)
    assert "So the bound L_S peaks at a lower beta than the ELBO, beyond chance" in said(bounds, "peak")
    assert "whether log p(x) does is not settled" in said(bounds, "peak")


def test_peaks_that_share_a_beta_cannot_be_told_apart():
    study = with_peak(not_distinguishable=[0.3, 1.0])
    study["sweep"]["mnist"]["peaks_distinguishable"] = False
    assert "the peaks cannot be told apart: beta = 1 cannot be told from the best of either" in said(study, "peak")


def test_peaks_at_one_beta_do_not_exclude_its_neighbors():
    study = with_peak(beta=1.0, not_distinguishable=[0.3, 1.0], is_reference=True)
    study["sweep"]["mnist"]["same_peak"] = True
    assert "Both are highest at the same beta on MNIST, though beta = 0.3 cannot be excluded" in said(study, "peak")


@pytest.mark.parametrize(
    ("elbo", "words"),
    [
        ([1.0, 1.0], "they agree: among these betas the peak of L_S is lower than the ELBO's in 2"),
        ([1.0, 0.3], "they do not agree: among these betas the peak of L_S is lower than the ELBO's in 1 and the same"),
    ],
)
def test_whether_seeds_agree_on_the_peaks_is_said(elbo, words):
    assert words in said(changed(("sweep", "mnist", "seed_peaks", "elbo"), elbo), "peak")


@pytest.mark.parametrize(
    ("gap", "word"), [(3.0, "smaller"), (4.3209, "not measurably larger or smaller"), (6.0, "larger")]
)
def test_the_gap_at_the_peak_is_compared_with_that_at_beta_one(gap, word):
    study = study_numbers()
    study["sweep"]["mnist"]["rows"][1]["gap"] = value(gap, 0.05)
    study["sweep"]["mnist"]["rows"][2]["gap"] = value(4.32, 0.05)
    assert f"is that gap at least, is {word} at beta = 0.3 than at beta = 1" in said(study, "peak")


# --- What they claim of the rest ---


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1.4, "The autoencoder has more of it"), (0.7, "has less of it"), (1.01, "not measurably more or less")],
)
def test_the_sharper_of_two_is_named_by_the_factor(factor, words):
    assert words in said(changed(("autoencoder", "mnist", "sharper"), value(factor, 0.02)), "blur")


@pytest.mark.parametrize(
    ("vae", "autoencoder", "words"),
    [
        (0.5, 0.75, "both blur."),
        (0.5, 0.97, "only the VAE measurably loses power."),
        (0.96, 0.97, "neither measurably loses power."),
        (0.5, 1.5, "(what the autoencoder has beyond one is noise, not detail)"),
    ],
)
def test_power_is_called_blur_only_where_it_is_lost(vae, autoencoder, words):
    study = study_numbers(("mnist",))
    study["autoencoder"]["mnist"]["vae"]["sharpness"] = value(vae, 0.01)
    study["autoencoder"]["mnist"]["autoencoder"]["sharpness"] = value(autoencoder, 0.01)
    assert words in said(study, "blur")


@pytest.mark.parametrize(
    ("factor", "words"), [(8.0, "is paid for in prior samples"), (0.5, "has no price"), (1.1, "that can be told")]
)
def test_samples_are_worse_only_where_they_are(factor, words):
    path = ("autoencoder", "mnist", "samples_worse", "frechet")
    assert words in said(changed(path, value(factor, 0.2)), "blur")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (0.001, "is what the VAE's mean reconstruction lacks"),
        (0.0001, "cannot be told from none"),
        (-0.001, "no more is lost"),
    ],
)
def test_what_is_lost_beside_is_judged_by_its_error(lost, words):
    study = study_numbers(("mnist",))
    study["autoencoder"]["mnist"]["decomposition"]["lost"] = value(lost, 0.0002)
    assert words in said(study, "blur")


def test_predictions_that_failed_are_named():
    assert "those that this predicts to collapse did, and no others" in said(study_numbers(), "averaging")
    study = changed(("mean", "mnist", "conditions", 1, "as_predicted"), False)
    words = "wrong with the mean over pixels on MNIST (predicted to collapse, shown 0 of 40 latents active)"
    assert words in said(study, "averaging")


def test_reconstructions_that_vary_are_not_called_the_same():
    study = changed(("mean", "mnist", "conditions", 1, "variation"), value(0.1, 0.01))
    assert said(study_numbers(), "averaging").count("they are all nearly the same") == 2
    assert said(study, "averaging").count("they are all nearly the same") == 1


@pytest.mark.parametrize(("difference", "word"), [(0.02, "a small share"), (20.0, "no small share")])
def test_a_difference_to_the_equal_beta_is_judged_by_its_size(difference, word):
    study = study_numbers(("mnist",))
    study["mean"]["mnist"]["mean_equals_beta_of_mean"]["reconstruction"] = paired(difference, 0.002)
    assert word in said(study, "averaging")


@pytest.mark.parametrize("more", [0, 3])
def test_a_warm_up_that_changes_little_is_said_to_change_little(more):
    study = study_numbers()
    for part in study["collapse"]["networks"].values():
        for row in part["rows"]:
            row["active"] = 20 + more * (row["remedy"] == "warm-up")
    assert "little or not at all" in said(study, "regularizer")
    assert "little or not at all" not in said(study_numbers(), "regularizer")


def test_a_remedy_that_is_not_distinguishable_is_called_so():
    study = study_numbers()
    study["collapse"]["networks"]["gated"]["rows"][1]["difference_log_likelihood"] = paired(0.05, 0.1, likelihood=True)
    assert "30 with a warm-up (not distinguishable in the bound L_S, +0.05 ± 0.10 nats)" in said(study, "collapse")


def test_a_bound_that_ranks_nothing_leaves_the_word_to_the_elbo():
    study = study_numbers()
    study["collapse"]["networks"]["gated"]["rows"][1]["difference_log_likelihood"]["ranks_log_likelihood"] = False
    assert "30 with a warm-up (better by 1.50 ± 0.10 nats in the ELBO)" in said(study, "collapse")


def test_a_dead_model_that_matches_the_prior_is_no_success():
    assert "A match alone proves nothing: the run of beta = 100" in said(study_numbers(), "check")


@pytest.mark.parametrize(
    ("effect", "words"), [(0.03, "not measurably"), (0.08, "only a little"), (0.12, "clearly (effect")]
)
def test_a_classifiers_effect_is_judged_by_its_size_where_it_is_measurable(effect, words):
    study = study_numbers(("mnist",))
    study["regularization"]["mnist"]["rows"][2]["classifier"]["effect"] = value(effect, 0.02)
    assert f"tells codes from prior draws {words}" in said(study, "check")


def test_a_test_that_rejects_nothing_proves_no_match():
    path = ("regularization", "mnist", "rows", 2, "kolmogorov_smirnov", "rejected")
    assert "rejects none of 40 latents (p below 0.00125 each" in said(changed(path, 0), "check")
    assert "which proves no match" in said(changed(path, 0), "check")


def test_uncorrected_rejections_are_set_beside_those_of_chance():
    path = ("regularization", "mnist", "rows", 2, "kolmogorov_smirnov", "level")
    assert "(p below 0.05 each: 2 are expected by chance)" in said(changed(path, None), "check")


def test_holes_that_differ_within_chance_are_not_ordered():
    study = study_numbers(("mnist",))
    assert "does not measurably change along beta" in said(study, "check")
    study["regularization"]["mnist"]["rows"][0]["holes"] = value(0.5, 0.01)
    assert "Holes on MNIST along beta: most at beta = 0.01" in said(study, "check")


@pytest.mark.parametrize(("gain", "told"), [(2.5, True), (0.1, False)])
def test_the_highest_network_is_held_against_the_next(gain, told):
    study = study_numbers()
    study["architectures"]["rows"][3]["difference_log_likelihood"] = paired(gain, likelihood=True)
    next_one = "; the gated network with 40 latents cannot be told from it"
    assert (next_one in said(study, "architectures")) is not told


@pytest.mark.parametrize(
    ("active", "words"),
    [(25, "More latents than the base's stay unused"), (60, "Not all are used"), (128, "Of 128 latents all")],
)
def test_unused_latents_are_counted_against_the_base(active, words):
    assert words in said(changed(("architectures", "rows", 2, "active"), active), "architectures")


def test_a_run_under_stress_that_learned_nothing_is_called_so():
    study = changed(("scale_maps", "stressed", 0, "elbo"), value(-584.0, 26.0))
    words = "bounded ended at an ELBO of -584 ± 26 nats, worse than pixels on their own without latents, -206.00 ± 0.25"
    assert words in said(study, "scale_maps")
    assert "worse than pixels" not in said(study_numbers(), "scale_maps")


def test_a_failure_in_evaluation_is_none_of_training():
    study = study_numbers()
    study["scale_maps"]["stressed"][1] |= {"failure_phase": "evaluation", "step": None}
    assert "exp trained to its end and broke in evaluation" in said(study, "scale_maps")


# --- What is missing ---


@pytest.mark.parametrize("section", SECTIONS)
def test_without_a_section_the_other_answers_stand(section):
    whole, found = study_numbers(), changed((section,), None)
    assert len(answers(whole)) == 8
    assert len(answers(found)) >= 7
    assert all(answer.short for answer in answers(found))


def test_one_data_set_suffices():
    assert len(answers(study_numbers(("fashion-mnist",)))) == 8
    assert " MNIST" not in text(study_numbers(("fashion-mnist",)))


def test_numbers_that_are_not_known_are_left_out():
    study = study_numbers()
    for part in study["regularization"].values():
        for row in part["rows"]:
            row |= {"holes": None, "mutual_information": None, "classifier": None, "kolmogorov_smirnov": None}
    for part in study["autoencoder"].values():
        part |= {"sharper": None, "samples_worse": None, "decomposition": None, "floor": None}
    assert "None" not in text(study)
    assert "nan" not in re.findall(r"\w+", text(study))


NEWER = ("unranked", "ranks_log_likelihood", "peaks_ranked", "edge", "largest_eigenvalue_as_seen", "level", "shares")
NEWER += ("frechet_uncorrected", "binarized", "sampled", "failure_phase", "variation")


@pytest.mark.parametrize("field", NEWER)
def test_a_field_that_is_not_there_is_done_without(field):
    whole, found = study_numbers(), study_numbers()
    _leave_out(found, field)
    assert len(answers(found)) == len(answers(whole))
    assert "None" not in text(found)


def _leave_out(part: Any, field: str) -> None:
    if isinstance(part, dict):
        part.pop(field, None)
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _leave_out(inner, field)


def test_the_study_is_left_as_it_is():
    study = study_numbers()
    before = copy.deepcopy(study)
    answers(study)
    assert study == before


# --- Words for numbers ---


@pytest.mark.parametrize(
    ("mean", "stderr", "words"),
    [
        (-86.1234, 0.1234, "-86.12 ± 0.12"),
        (-86.1234, 0.41, "-86.1 ± 0.4"),
        (1234.5, 25.0, "1,234 ± 25"),
        (0.00012345, 0.00001, "0.000123 ± 0.000010"),
        (0.0000012345, 0.00000004, "1.23e-06 ± 4e-08"),
        (0.0, 0.0, "0"),
        (-0.001, 0.4, "0.0 ± 0.4"),
        (12.3456, None, "12.3"),
    ],
)
def test_a_mean_is_given_to_the_digits_of_its_error(mean, stderr, words):
    assert plus_minus({"mean": mean, "stderr": stderr}) == words


def test_a_difference_has_a_sign():
    assert signed({"mean": 1.25, "stderr": 0.1}) == "+1.25 ± 0.10"


@pytest.mark.parametrize(
    ("given", "words"),
    [(784.0, "784"), (0.0663, "0.0663"), (12345.6, "12,300"), (0.0, "0"), (1e13, "10,000,000,000,000")],
)
def test_a_number_has_three_digits(given, words):
    assert number(given) == words


def test_shares_and_lists_read_as_they_are_spoken():
    assert [percent(0.123), percent(0.0123), percent(0.0)] == ["12%", "1.2%", "0%"]
    assert percent_plus_minus({"mean": 1.3e-10, "stderr": 7e-11}) == "less than 0.0001%"
    assert [listed([0.5]), listed([0.5, 1.0]), listed(["a", "b", "c"])] == ["0.5", "0.5 and 1", "a, b and c"]
