"""The study's answers, in words: each number and each "more" or "less" of the text is read from study.json."""

from ppl_vae.study.answers.order import answers
from ppl_vae.study.answers.sentences import Answer

__all__ = ["Answer", "answers"]
