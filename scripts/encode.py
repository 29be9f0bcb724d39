"""Latents and log p(x) of images under a run: of your own, or of a split of its data."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("encode")
