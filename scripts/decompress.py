"""A file of compressed images, decoded."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("decompress")
