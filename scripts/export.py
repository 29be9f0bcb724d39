"""Export a run as one folder to share: its model without the training, its numbers, and a model card."""

from ppl_vae.options import command, parse_export


def main() -> None:
    asked = parse_export()
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    experiment.export_run(asked.run_dir, output=asked.output, say=print)


if __name__ == "__main__":
    command(main)
