"""Estimate log p(x) of a run by importance sampling, with its errors, into the run's evaluation.json."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("evaluate")
