"""The study: every run trained and measured, all numbers in one JSON, and one report of what they show."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("study")
