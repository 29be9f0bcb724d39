"""The study's report: what was measured, in pictures and in words, as one HTML page."""

from ppl_vae.study.page.composition import REPORT, compose, write_report

__all__ = ["REPORT", "compose", "write_report"]
