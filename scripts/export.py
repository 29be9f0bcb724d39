"""Export a run as one folder to share: its model without the training, its numbers, and a model card."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("export")
