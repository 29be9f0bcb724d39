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
from ppl_vae.study.words import listed, number, percent, plus_minus, signed

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
    "path",
    [
        ("sweep", "mnist", "rows", 0, "rate", "mean"),
        ("sweep", "mnist", "rows", -1, "distortion", "mean"),
        ("sweep", "mnist", "rows", 2, "implied_beta", "mean"),
        ("sweep", "mnist", "rows", 2, "gap", "mean"),
        ("sweep", "mnist", "peaks", "log_likelihood", "value", "mean"),
        ("sweep", "mnist", "peaks", "log_likelihood", "difference_to_reference", "mean"),
        ("sweep", "fashion-mnist", "peaks", "elbo", "value", "mean"),
        ("sweep", "mnist", "seeds", 1, "log_likelihood", "spread"),
        ("mean", "mnist", "num_pixels"),
        ("mean", "mnist", "eigenvalues", 0),
        ("mean", "mnist", "num_eigenvalues"),
        ("mean", "mnist", "gaussian_variance", "mean_squared_error"),
        ("mean", "mnist", "gaussian_variance", "largest_eigenvalue"),
        ("mean", "mnist", "conditions", 0, "active"),
        ("mean", "mnist", "conditions", 1, "variation", "mean"),
        ("mean", "mnist", "conditions", 1, "threshold"),
        ("mean", "mnist", "mean_equals_beta_of_mean", "reconstruction", "mean"),
        ("collapse", "networks", "residual", "rows", 1, "active"),
        ("collapse", "networks", "residual", "rows", 2, "difference_log_likelihood", "mean"),
        ("autoencoder", "mnist", "vae", "sharpness", "mean"),
        ("autoencoder", "mnist", "sharper", "mean"),
        ("autoencoder", "mnist", "decomposition", "posterior_noise", "mean"),
        ("autoencoder", "mnist", "samples_worse", "frechet", "mean"),
        ("autoencoder", "mnist", "samples_worse", "classifier", "mean"),
        ("autoencoder", "mnist", "floor", "frechet", "mean"),
        ("autoencoder", "mnist", "reconstruction_difference", "mean"),
        ("autoencoder", "mnist", "latents", 0, "sharpness", "mean"),
        ("regularization", "mnist", "rows", 2, "classifier", "effect", "mean"),
        ("regularization", "mnist", "rows", 2, "kolmogorov_smirnov", "rejected"),
        ("regularization", "mnist", "rows", 2, "kolmogorov_smirnov", "max"),
        ("regularization", "mnist", "rows", 2, "holes", "mean"),
        ("regularization", "mnist", "rows", 2, "mutual_information", "mean"),
        ("regularization", "mnist", "rows", -1, "classifier", "effect", "mean"),
        ("architectures", "rows", 3, "log_likelihood", "mean"),
        ("architectures", "rows", 3, "parameters"),
        ("scale_maps", "gradients", 5, "not_finite"),
        ("scale_maps", "stressed", 1, "step"),
    ],
    ids=lambda path: "/".join(map(str, path)),
)
def test_the_text_follows_the_numbers(path):
    old = study_numbers()
    for key in path:
        old = old[key]
    assert text(changed(path, old * 1.37 + 0.11 if isinstance(old, float) else old + 3)) != text(study_numbers())


# --- What they claim ---


def test_a_peak_that_is_not_distinguishable_is_called_so():
    peak = {"difference_to_reference": paired(0.1, 0.1, likelihood=True), "not_distinguishable": [0.3, 1.0]}
    study = study_numbers()
    study["sweep"]["mnist"]["peaks"]["log_likelihood"] |= peak
    assert "but is not distinguishable from beta = 1;" not in said(study_numbers(), "peak")
    assert "against beta = 1, on the same images), but is not distinguishable from beta = 1." in said(study, "peak")


def test_a_peak_whose_estimate_has_not_settled_is_not_certain():
    path = ("sweep", "mnist", "peaks", "log_likelihood", "reliable")
    assert "the peak is not certain" in said(changed(path, False), "peak")
    assert "the peak is not certain" not in said(study_numbers(), "peak")


def test_a_peak_at_the_end_of_the_sweep_is_called_so():
    path = ("sweep", "mnist", "peaks", "log_likelihood", "beta")
    assert "an end of the sweep" in said(changed(path, 100.0), "peak")


def test_peaks_of_both_bounds_are_compared():
    assert "log p(x) peaks at a lower beta than the ELBO, and not by chance" in said(study_numbers(), "peak")
    same = changed(("sweep", "mnist", "same_peak"), True)
    assert "Both peak at the same beta on MNIST" in said(same, "peak")
    close = changed(("sweep", "mnist", "peaks_distinguishable"), False)
    assert "some beta is as good as the best of both" in said(close, "peak")


@pytest.mark.parametrize(("gap", "word"), [(3.0, "smaller"), (4.3209, "about the same"), (6.0, "larger")])
def test_the_gap_at_the_peak_is_compared_with_that_at_beta_one(gap, word):
    study = study_numbers()
    study["sweep"]["mnist"]["rows"][1]["gap"] = value(gap, 0.05)
    study["sweep"]["mnist"]["rows"][2]["gap"] = value(4.32, 0.05)
    assert f"On MNIST the gap is {word} at beta = 0.3" in said(study, "peak")


@pytest.mark.parametrize(
    ("factor", "words"), [(1.4, "The autoencoder is sharper"), (0.7, "is blurrier"), (1.01, "not measurably sharper")]
)
def test_the_sharper_of_two_is_named_by_the_factor(factor, words):
    assert words in said(changed(("autoencoder", "mnist", "sharper"), value(factor, 0.02)), "blur")


@pytest.mark.parametrize(
    ("factor", "words"), [(8.0, "is paid for in prior samples"), (0.5, "has no price"), (1.1, "that can be told")]
)
def test_samples_are_worse_only_where_they_are(factor, words):
    path = ("autoencoder", "mnist", "samples_worse", "frechet")
    assert words in said(changed(path, value(factor, 0.2)), "blur")


def test_a_part_of_the_error_that_is_negative_is_no_loss():
    study = changed(("autoencoder", "mnist", "decomposition", "lost"), value(-0.001))
    assert "no more is lost" in said(study, "blur")


def test_predictions_that_failed_are_named():
    assert "what was predicted to collapse did, and nothing else" in said(study_numbers(), "averaging")
    study = changed(("mean", "mnist", "conditions", 1, "as_predicted"), False)
    assert "wrong for mnist-mean-over-pixels" in said(study, "averaging")


def test_a_mean_that_did_not_collapse_is_not_called_the_same():
    study = study_numbers()
    study["mean"]["mnist"]["conditions"][1] |= {"shown_collapse": False, "active": 7}
    assert said(study_numbers(), "averaging").count("they are all the same") == 2
    assert said(study, "averaging").count("they are all the same") == 1


def test_a_warm_up_that_changes_nothing_is_said_to_change_nothing():
    study = study_numbers()
    for part in study["collapse"]["networks"].values():
        for row in part["rows"]:
            row["active"] = 20
    assert "changed nothing in the number of active latents" in said(study, "regularizer")


def test_a_remedy_that_is_not_distinguishable_is_called_so():
    study = study_numbers()
    study["collapse"]["networks"]["gated"]["rows"][1]["difference_log_likelihood"] = paired(0.05, 0.1, likelihood=True)
    assert "With a warm-up it has 30, though log p(x) is not distinguishable (+0.05 ± 0.10 nats)" in said(
        study, "collapse"
    )


def test_a_bound_that_ranks_nothing_leaves_the_word_to_the_elbo():
    study = study_numbers()
    study["collapse"]["networks"]["gated"]["rows"][1]["difference_log_likelihood"]["ranks_log_likelihood"] = False
    assert "With a warm-up it has 30, which is better by 1.50 ± 0.10 nats in the ELBO" in said(study, "collapse")


def test_a_dead_model_that_matches_the_prior_is_no_success():
    assert "A match alone proves nothing: the run of beta = 100" in said(study_numbers(), "check")


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
        (0.00012345, 0.00001, "0.0001 ± 0.0000"),
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
    assert [listed([0.5]), listed([0.5, 1.0]), listed(["a", "b", "c"])] == ["0.5", "0.5 and 1", "a, b and c"]
