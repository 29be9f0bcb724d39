"""Train a VAE by SVI; estimate its log-likelihood and draw its figures; or go on with an interrupted run."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("train")
