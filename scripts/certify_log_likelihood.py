"""Bound log p(x) of a run from both sides, test its guide, and say where nats are lost, into its evaluation.json."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("certify")
