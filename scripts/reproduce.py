"""Train a published model again, evaluate it, and add a row to the table of those that were."""

from ppl_vae.options import command, parse_reproduce


def main() -> None:
    asked = parse_reproduce()
    if asked.list:
        from ppl_vae import recipes

        print("\n".join(recipes.describe()))
        return
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    if asked.table:
        rows = experiment.read_rows(asked.output)
        tables = experiment.reproduction_table(rows), experiment.seeds_table(rows)
        print("\n\n".join(table for table in tables if table))
        return
    experiment.reproduce(
        asked.name,
        epochs=asked.epochs,
        epochs_share=asked.epochs_share,
        precision=asked.precision,
        seed=asked.seed,
        device=asked.device,
        data_dir=asked.data_dir,
        run_dir=asked.run_dir,
        output=asked.output,
        say=print,
    )


if __name__ == "__main__":
    command(main)
