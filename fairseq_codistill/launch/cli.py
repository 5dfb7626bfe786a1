"""Owns the command line of ``codistill-launch``: n models, n ordinary jobs, from one command on one machine.

It plans (:mod:`~fairseq_codistill.launch.plan`), shows the plan (:mod:`~fairseq_codistill.launch.traffic`) or runs it
(:mod:`~fairseq_codistill.launch.local`), and decides nothing about training.
"""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence

from fairseq_codistill import __version__
from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.checks import check_jobs
from fairseq_codistill.launch.deaths import Deaths
from fairseq_codistill.launch.local import Supervisor
from fairseq_codistill.launch.logs import default_log_dir, model_logs
from fairseq_codistill.launch.plan import Job, make_jobs, model_commands
from fairseq_codistill.launch.resources import pick_ports, visible_devices
from fairseq_codistill.launch.runtime import run_folder
from fairseq_codistill.launch.traffic import traffic_report

DESCRIPTION = """\
Train n models that teach each other, each an ordinary job of its own, from one command.

In every argument {model} becomes the number of the model from 0, {model+1} that number plus one (any number), and
{num_models} n. Give the models different seeds and folders:

  codistill-launch --num-models 2 -- fairseq-train DATA --seed {model+1} --save-dir checkpoints/{model} ...
"""


def make_parser() -> argparse.ArgumentParser:
    """The launcher's own options: what stands before ``--``."""
    parser = argparse.ArgumentParser(
        prog="codistill-launch",
        usage="%(prog)s --num-models N [options] -- COMMAND [ARGUMENTS]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--num-models", type=int, required=True, metavar="N", help="how many models")
    parser.add_argument("--devices-per-model", type=int, default=1, metavar="X", help="data-parallel ranks a model; 1")
    parser.add_argument(
        "--model-args",
        action="append",
        nargs=2,
        default=[],
        metavar=("I", "ARGS"),
        help="arguments for model I only, quoted as one word; they come last, so they win. Can be repeated",
    )
    parser.add_argument(
        "--base-port", type=int, metavar="PORT", help="first of n (X + 1) ports in a row; default: free ones are picked"
    )
    parser.add_argument(
        "--share-devices", action="store_true", help="let models share GPUs when there are fewer than N times X"
    )
    parser.add_argument(
        "--fail-fast", action="store_true", help="end all models when one fails; default: the others go on without it"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start a model that failed again, up to N times; it goes on from its last checkpoint and skips ahead to "
        "where the others are; 0",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds between asking a job to end, which saves first, and killing it; 30",
    )
    parser.add_argument(
        "--log-dir",
        metavar="DIR",
        help="keep what model I writes in DIR/model-I.log, appended; none: keep nothing. Default: the folder that "
        "holds the models' --save-dir",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands and the bits they will send; start nothing"
    )
    parser.add_argument(
        "--link",
        metavar="SPEED",
        help="with --dry-run: speed of the link of one device, such as 20mbit or 1gbit; proposes codec, interval, "
        "parts and peers for it, and says why",
    )
    plan = parser.add_argument_group("what --dry-run cannot find out by itself")
    plan.add_argument("--plan-classes", type=int, metavar="V", help="classes, or the size of the target vocabulary")
    plan.add_argument("--plan-rows", type=int, metavar="B", help="images or target tokens of one device per update")
    plan.add_argument("--plan-parameters", type=int, metavar="P", help="trained parameters of one model")
    plan.add_argument(
        "--plan-step-s",
        type=float,
        metavar="S",
        help="seconds of an update without communication; adds links hours",
    )
    return parser


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the launcher's own arguments from the command, at the first ``--``."""
    argv = list(argv)
    if "--" not in argv:
        return argv, []
    position = argv.index("--")
    own, command = argv[:position], argv[position + 1 :]
    # argparse takes "--fp16" for an option of ours, and " --fp16", which says the same here, for a value.
    for index, argument in enumerate(own[:-2]):
        if argument == "--model-args":
            own[index + 2] = " " + own[index + 2]
    return own, command


def parse_model_args(pairs: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """``[["1", "--arch x"]]`` -> ``{1: ["--arch", "x"]}``; several for one model are joined.

    Raises:
        ConfigError: the first word is no number, or the quotes of the second do not close.
    """
    found: dict[int, list[str]] = {}
    for model, text in pairs:
        try:
            found.setdefault(int(model), []).extend(shlex.split(text))
        except ValueError as error:
            raise ConfigError(
                f"--model-args {model} {text.strip()!r}: {error}; give the number of a model, then its arguments as "
                "one quoted word"
            ) from error
    return found


def count_cuda_devices() -> int:
    """Asked only where neither ``--cpu`` nor CUDA_VISIBLE_DEVICES decides: it loads torch."""
    import torch

    return torch.cuda.device_count()


def plan_jobs(
    options: argparse.Namespace, command: Sequence[str], keys: str | None = None
) -> tuple[list[list[str]], list[Job]]:
    """The models' own commands, and the processes to start for them, with the keys of the run in folder ``keys``.

    Raises:
        ConfigError: whatever cannot work, before anything has started.
    """
    commands = model_commands(command, options.num_models, parse_model_args(options.model_args))
    if options.devices_per_model < 1:
        raise ConfigError(f"--devices-per-model is {options.devices_per_model}; it must be at least 1")
    if not options.grace_s >= 0:
        raise ConfigError(f"--grace-s is {options.grace_s}; it must be 0 or more")
    if options.link is not None and not options.dry_run:
        raise ConfigError(f"--link is {options.link!r} without --dry-run: it only proposes settings; add --dry-run")
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts is {options.max_restarts}; it must be 0 or more")
    ports = pick_ports(options.num_models, options.devices_per_model, options.base_port)
    # Before devices are counted, which takes seconds.
    check_jobs(make_jobs(commands, ports, None, keys=keys))
    devices = visible_devices(commands[0], os.environ, count_cuda_devices)
    return commands, make_jobs(commands, ports, devices, options.share_devices, keys)


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``codistill-launch``.

    Returns:
        0 when every model ended well, 1 when one failed, 128 + a signal's number; 2 (by exit) for a wrong setting.
    """
    own, command = split_command(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    options = parser.parse_args(own)
    with contextlib.ExitStack() as stack:
        try:
            if options.dry_run:
                commands, jobs = plan_jobs(options, command)
                report = traffic_report(
                    commands,
                    options.plan_classes,
                    options.plan_rows,
                    options.plan_parameters,
                    options.plan_step_s,
                    options.link,
                )
                print("\n".join([*(f"# {job.label}\n{job.shell()}" for job in jobs), "", report]))
                return 0
            keys = os.path.join(stack.enter_context(run_folder(os.environ)), "keys")
            commands, jobs = plan_jobs(options, command, keys)
            log_dir = default_log_dir(commands) if options.log_dir is None else options.log_dir
            logs = stack.enter_context(model_logs(None if log_dir == "none" else log_dir, options.num_models))
            from fairseq_codistill.coordinator.transports.curve_keys import (
                make_keys,  # loads ZeroMQ, which a plan does not need
            )

            make_keys(keys, options.num_models)
        except (ConfigError, OSError) as error:
            parser.error(str(error))
        for job in jobs:
            print(f"[launch] {job.label}: {job.shell()}", file=sys.stderr, flush=True)
        return Supervisor(
            jobs,
            options.grace_s,
            options.fail_fast,
            options.max_restarts,
            logs,
            Deaths(jobs, options.num_models, options.devices_per_model),
        ).run()


if __name__ == "__main__":
    sys.exit(main())
