"""Draw images from a run: z ~ p(z), x ~ p(x | z), as arrays and as pictures."""

from ppl_vae.options import command, parse_sample


def main() -> None:
    asked = parse_sample()
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    experiment.sample_run(
        asked.run_dir,
        num_samples=asked.num_samples,
        seed=asked.seed,
        device=asked.device,
        output=asked.output,
        say=print,
        dataset=asked.dataset,
        data_dir=asked.data_dir,
    )


if __name__ == "__main__":
    command(main)
