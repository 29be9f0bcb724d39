"""Images of a run as a file of about -log2 p(x) bits, by bits-back coding."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("compress")
