"""Every question that the study's runs answer, in the order in which a reader asks."""

from __future__ import annotations

from ppl_vae.study.answers.averaging import averaging_answer
from ppl_vae.study.answers.blur import blur_answer
from ppl_vae.study.answers.check import check_answer
from ppl_vae.study.answers.networks import architectures_answer
from ppl_vae.study.answers.peak import peak_answer
from ppl_vae.study.answers.regularizer import collapse_answer, regularizer_answer
from ppl_vae.study.answers.scale_maps import scale_maps_answer
from ppl_vae.study.answers.sentences import Answer, Study

_QUESTIONS = (
    regularizer_answer,
    check_answer,
    blur_answer,
    averaging_answer,
    peak_answer,
    collapse_answer,
    architectures_answer,
    scale_maps_answer,
)


def answers(study: Study) -> list[Answer]:
    """Every question that the study's runs answer, in the order in which a reader asks.

    Where a measurement is missing, what rests on it is left out.

    Args:
        study: study.json.
    """
    found = (answer(study) for answer in _QUESTIONS)
    return [answer for answer in found if answer.short]
