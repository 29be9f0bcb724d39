"""What a run does and why: its latents, noise, holes and blur in numbers, verdicts, and what would change them."""

from ppl_vae.options import command, parse_diagnose


def main() -> None:
    asked = parse_diagnose()
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    experiment.diagnose_run(
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
