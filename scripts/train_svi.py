"""Train a VAE by SVI; estimate its log-likelihood and draw its figures; or go on with an interrupted run."""

from ppl_vae.commands.cli import parse_train
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_train()
    from ppl_vae.commands.train import resume as resume_run
    from ppl_vae.commands.train import train as train_run

    if asked.options is not None:
        train_run(asked.options, asked.run_dir, say=print)
    elif asked.resume is not None:
        resume_run(
            asked.resume,
            epochs=asked.epochs,
            dataset=asked.dataset,
            data_dir=asked.data_dir,
            compile=asked.compile,
            say=print,
        )


if __name__ == "__main__":
    command(main)
