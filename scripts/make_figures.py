"""Draw a run's figures again from its files: curves, images, latents, and what its log-likelihood is made of."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("figures")
