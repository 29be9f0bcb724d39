"""Images with missing pixels under a run: log p of what is observed, and draws of what is missing."""

from ppl_vae.commands.cli import parse_impute
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_impute()
    from ppl_vae.commands.impute import impute_images

    impute_images(
        asked.run_dir,
        asked.images_path,
        mask=asked.mask,
        hide=asked.hide,
        num_particles=asked.num_particles,
        num_draws=asked.num_draws,
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
