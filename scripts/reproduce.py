"""Train a published model again, evaluate it, and add a row to the table of those that were."""

from ppl_vae.commands.cli import parse_reproduce
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_reproduce()
    if asked.list:
        from ppl_vae.runs import recipes

        print("\n".join(recipes.describe()))
        return
    from ppl_vae.commands.reproduce import read_rows, reproduction_table, seeds_table
    from ppl_vae.commands.reproduce import reproduce as reproduce_recipe

    if asked.table:
        rows = read_rows(asked.output)
        tables = reproduction_table(rows), seeds_table(rows)
        print("\n\n".join(table for table in tables if table))
        return
    reproduce_recipe(
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
