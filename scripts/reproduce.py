"""Train a published model again, evaluate it, and add a row to the table of those that were."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("reproduce")
