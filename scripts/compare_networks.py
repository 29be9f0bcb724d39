"""One table: a plain VAE of each network, its weights, seconds an epoch, and log p(x) after the same time."""

from pathlib import Path

from ppl_vae.commands.cli import parse_networks
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_networks()
    from ppl_vae.commands.compare_networks import compare_networks

    options = Options(
        dataset=asked.dataset,
        data_dir=asked.data_dir,
        image_size=None if asked.image_size is None else tuple(asked.image_size),
        fit=asked.fit,
        color=asked.color,
        likelihood=asked.likelihood,
        compile=asked.compile,
        images=asked.images,
        evaluation_particles=asked.num_particles,
        **PLAIN,
    )
    parent = asked.run_dir or f"runs/networks-{Path(asked.dataset).stem}"
    compare_networks(asked.networks, options, minutes=asked.minutes, run_dir=parent, output=asked.output, say=print)
    if len(asked.networks) == 1:
        return
    folders = " ".join(f"{parent}/{network}" for network in asked.networks)
    print(f"Paired differences: python scripts/compare_runs.py {folders}")


if __name__ == "__main__":
    command(main)
