"""What a run does and why: its latents, noise, holes and blur in numbers, verdicts, and what would change them."""

from ppl_vae.commands.cli import parse_diagnose
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_diagnose()
    from ppl_vae.commands.diagnose import diagnose_run

    diagnose_run(
        asked.run_dir,
        split=asked.split,
        images=asked.images,
        device=asked.device,
        seed=asked.seed,
        dataset=asked.dataset,
        data_dir=asked.data_dir,
        say=print,
    )


if __name__ == "__main__":
    command(main)
