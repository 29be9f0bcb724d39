"""Export a run as one folder to share: its model without the training, its numbers, and a model card."""

from ppl_vae.commands.cli import parse_export
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_export()
    from ppl_vae.commands.export import export_run

    export_run(asked.run_dir, output=asked.output, say=print)


if __name__ == "__main__":
    command(main)
