"""Train a VAE by SVI; estimate its log-likelihood and draw its figures; or go on with an interrupted run."""

from ppl_vae.options import command, parse_train


def main() -> None:
    asked = parse_train()
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    if asked.options is not None:
        experiment.train(asked.options, asked.run_dir, say=print)
    elif asked.resume is not None:
        experiment.resume(
            asked.resume,
            epochs=asked.epochs,
            dataset=asked.dataset,
            data_dir=asked.data_dir,
            compile=asked.compile,
            say=print,
        )


if __name__ == "__main__":
    command(main)
