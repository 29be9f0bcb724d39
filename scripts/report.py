"""One run as a page to read: its likelihood, what stands out, its figures, and its decoder to play with."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("report")
