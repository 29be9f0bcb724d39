"""Latents and log p(x) of images under a run: of your own, or of a split of its data."""

from ppl_vae.commands.cli import parse_encode
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_encode()
    from ppl_vae.commands.encode import encode_images

    encode_images(
        asked.run_dir,
        asked.images_path,
        num_particles=asked.num_particles,
        images=asked.images,
        seed=asked.seed,
        device=asked.device,
        output=asked.output,
        say=print,
        dataset=asked.dataset,
        data_dir=asked.data_dir,
    )


if __name__ == "__main__":
    command(main)
