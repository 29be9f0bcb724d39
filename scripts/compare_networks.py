"""One table: a plain VAE of each network, its weights, seconds an epoch, and log p(x) after the same time."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("compare-networks")
