"""Compare runs on the same images: the paired differences of their bounds on log p(x), with errors, in words."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("compare")
