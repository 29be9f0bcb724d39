"""Bound log p(x) of a run from both sides, test its guide, and say where nats are lost, into its evaluation.json."""

from ppl_vae.commands.cli import parse_certify
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_certify()
    from ppl_vae.commands.certify import certify_run

    certify_run(
        asked.run_dir,
        split=asked.split,
        images=asked.images,
        simulated=asked.simulated,
        temperatures=asked.temperatures,
        leapfrogs=asked.leapfrogs,
        chains=asked.chains,
        start=asked.start,
        num_particles=asked.num_particles,
        gap_images=asked.gap_images,
        simulations=asked.simulations,
        draws=asked.draws,
        against=asked.against,
        against_data_dir=asked.against_data_dir,
        device=asked.device,
        seed=asked.seed,
        compile=asked.compile,
        dataset=asked.dataset,
        data_dir=asked.data_dir,
        output=asked.output,
        say=print,
    )


if __name__ == "__main__":
    command(main)
