"""``fairseq-train`` that also writes every training loss, unrounded: ``recording_train.py LOSSES.json ARGS...``."""

import json
import sys

from fairseq import trainer
from fairseq_cli.train import cli_main

losses = []
original_init = trainer.Trainer.__init__


def recording_init(self, cfg, task, *args, **kwargs):
    original_train_step = task.train_step

    def recorded_train_step(*its_args, **its_kwargs):
        loss, sample_size, logging_output = original_train_step(*its_args, **its_kwargs)
        losses.append(float(loss) / float(sample_size))
        return loss, sample_size, logging_output

    task.train_step = recorded_train_step
    original_init(self, cfg, task, *args, **kwargs)


if __name__ == "__main__":
    path = sys.argv.pop(1)
    trainer.Trainer.__init__ = recording_init
    cli_main()
    with open(path, "w") as file:
        json.dump(losses, file)
