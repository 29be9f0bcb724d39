"""Images with missing pixels under a run: log p of what is observed, and draws of what is missing."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("impute")
