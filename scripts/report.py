"""One run as a page to read: its likelihood, what stands out, its figures, and its decoder to play with."""

from ppl_vae.commands.cli import parse_report
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_report()
    from ppl_vae.reports.run_page import report_run

    report_run(asked.run_dir, output=asked.output, dataset=asked.dataset, data_dir=asked.data_dir, say=print)


if __name__ == "__main__":
    command(main)
