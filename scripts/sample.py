"""Draw images from a run: z ~ p(z), x ~ p(x | z), as arrays and as pictures."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("sample")
