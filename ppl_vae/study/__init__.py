"""The study: what a VAE does and why, on data, in runs that differ in one thing each."""

from ppl_vae.study.plan import DEFAULT, QUICK, Size
from ppl_vae.study.run import collect

__all__ = ["DEFAULT", "QUICK", "Size", "collect"]
