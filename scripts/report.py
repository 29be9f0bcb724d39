"""One run as a page to read: its likelihood, what stands out, its figures, and its decoder to play with."""

from ppl_vae.options import command, parse_report


def main() -> None:
    asked = parse_report()
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    experiment.report_run(asked.run_dir, output=asked.output, dataset=asked.dataset, data_dir=asked.data_dir, say=print)


if __name__ == "__main__":
    command(main)
