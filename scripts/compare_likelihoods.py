"""One table: the same plain VAE under each likelihood, trained for the same epochs, compared on one scale."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("compare-likelihoods")
