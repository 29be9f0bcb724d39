"""Estimate log p(x) of a run by importance sampling, with its errors, into the run's evaluation.json."""

from ppl_vae.commands.cli import parse_evaluate
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_evaluate()
    from ppl_vae.commands.evaluate import evaluate_run

    evaluate_run(
        asked.run_dir,
        split=asked.split,
        num_particles=asked.num_particles,
        images=asked.images,
        device=asked.device,
        seed=asked.seed,
        compile=asked.compile,
        dequantization_draws=asked.dequantization_draws,
        dataset=asked.dataset,
        data_dir=asked.data_dir,
        say=print,
    )


if __name__ == "__main__":
    command(main)
