"""Draw images from a run: z ~ p(z), x ~ p(x | z), as arrays and as pictures."""

from ppl_vae.commands.cli import parse_sample
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_sample()
    from ppl_vae.commands.sample import sample_run

    sample_run(
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
