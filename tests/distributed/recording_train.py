"""``fairseq-train`` that also writes every training loss, unrounded: ``recording_train.py LOSSES.json ARGS...``."""

import json
import sys

import fairseq.tasks.fairseq_task as fairseq_task
from fairseq_cli.train import cli_main

losses = []
original_train_step = fairseq_task.FairseqTask.train_step


def recorded_train_step(self, *args, **kwargs):
    loss, sample_size, logging_output = original_train_step(self, *args, **kwargs)
    losses.append(float(loss) / float(sample_size))
    return loss, sample_size, logging_output


if __name__ == "__main__":
    path = sys.argv.pop(1)
    fairseq_task.FairseqTask.train_step = recorded_train_step
    cli_main()
    with open(path, "w") as file:
        json.dump(losses, file)
