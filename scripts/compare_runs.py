"""Compare runs on the same images: the paired differences of their bounds on log p(x), with errors, in words."""

from ppl_vae.commands.cli import parse_compare
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_compare()
    from ppl_vae.commands.compare_runs import compare_runs

    compare_runs(
        asked.run_dirs,
        split=asked.split,
        num_particles=asked.num_particles,
        images=asked.images,
        device=asked.device,
        seed=asked.seed,
        compile=asked.compile,
        dequantization_draws=asked.dequantization_draws,
        output=asked.output,
        dataset=asked.dataset,
        data_dir=asked.data_dir,
        say=print,
    )


if __name__ == "__main__":
    command(main)
