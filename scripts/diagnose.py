"""What a run does and why: its latents, noise, holes and blur in numbers, verdicts, and what would change them."""

from ppl_vae.commands.cli import main

if __name__ == "__main__":
    main("diagnose")
