"""Owns the command line of ``codistill-launch``: n models, n ordinary jobs, from one command, here or on a cluster.

It plans (:mod:`~fairseq_codistill.launch.plan`), shows the plan (:mod:`~fairseq_codistill.launch.traffic`) or runs it
(:mod:`~fairseq_codistill.launch.executors`), and decides nothing about training.
"""

import argparse
import io
import math
import os
import shlex
import sys
from collections.abc import Sequence

from fairseq_codistill import __version__
from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.checks import check_jobs, refuse_beginning_again
from fairseq_codistill.launch.executors import execute, show_plan
from fairseq_codistill.launch.plan import make_jobs, model_commands
from fairseq_codistill.launch.resources import AUTOMATIC_PORTS, Ports
from fairseq_codistill.launch.traffic import traffic_report, without_option

OF_ONE_EXECUTOR = {  # of the options, those that not all executors know
    "share_devices": ("local",),
    "base_port": ("local", "slurm"),
    "slurm": ("slurm",),
    "wait": ("slurm",),
    "run_dir": ("slurm",),
    "devices_per_node": ("slurm",),
    "cpus_per_device": ("slurm", "ray"),
    "ray_address": ("ray",),
}

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
        "--on",
        choices=("local", "slurm", "ray"),
        default="local",
        help="where: this machine; SLURM, in the allocation that this is called in, or else in a job that it submits; "
        "a Ray cluster. local",
    )
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
        help="seconds between asking a job to end, so that it may save, and killing it; 30",
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
        "--no-bits", action="store_true", help="with --dry-run: the commands alone, for which no model has to be built"
    )
    parser.add_argument(
        "--link",
        metavar="SPEED",
        help="with --dry-run: speed of the link of one device, such as 20mbit or 1gbit; proposes codec, interval, "
        "parts and peers for it, and says why",
    )
    cluster = parser.add_argument_group("on a cluster")
    cluster.add_argument(
        "--slurm", metavar="OPTIONS", help="of sbatch, as one quoted word: --slurm '--partition gpu --time 48:00:00'"
    )
    cluster.add_argument(
        "--wait",
        action="store_true",
        help="show what the job on SLURM writes until it ends, and end with its exit code",
    )
    cluster.add_argument(
        "--run-dir",
        metavar="DIR",
        help="on a file system that all nodes have, for keys, batch script and output of the job; default: the folder "
        "that holds the models' --save-dir",
    )
    cluster.add_argument(
        "--devices-per-node",
        type=int,
        metavar="D",
        help="devices of a node: a model takes whole nodes, or several models share one; default: X, a model a node",
    )
    cluster.add_argument("--cpus-per-device", type=int, metavar="C", help="cores for each rank; Ray: 1")
    cluster.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a running Ray cluster; default: one is started here"
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
    for index, argument in enumerate(own[:-1]):
        if argument == "--slurm":
            own[index + 1] = " " + own[index + 1]
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


def plan_models(options: argparse.Namespace, command: Sequence[str]) -> list[list[str]]:
    """The models' own commands.

    Raises:
        ConfigError: whatever cannot work, before anything has started.
    """
    commands = model_commands(command, options.num_models, parse_model_args(options.model_args))
    if options.devices_per_model < 1:
        raise ConfigError(f"--devices-per-model is {options.devices_per_model}; it must be at least 1")
    if not 0 <= options.grace_s < math.inf:
        raise ConfigError(f"--grace-s is {options.grace_s}; it must be a number of seconds, 0 or more")
    if options.link is not None and not options.dry_run:
        raise ConfigError(f"--link is {options.link!r} without --dry-run: it only proposes settings; add --dry-run")
    if options.no_bits and (options.link is not None or not options.dry_run):
        raise ConfigError(
            "--no-bits is for --dry-run without --link, which proposes settings by the bits; leave it out"
        )
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts is {options.max_restarts}; it must be 0 or more")
    for own in commands if options.max_restarts else ():
        refuse_beginning_again(own)
    for name in ("cpus_per_device", "plan_classes", "plan_rows", "plan_parameters"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {given}; it must be at least 1")
    for flag, executor in OF_ONE_EXECUTOR.items():
        if getattr(options, flag) not in (None, False) and options.on not in executor:
            name = "--" + flag.replace("_", "-")
            raise ConfigError(
                f"{name} is given with --on {options.on}; it is an option of --on {' and '.join(executor)}"
            )
    # Before devices are counted, which takes seconds, or a job waits in a queue; with addresses as good as any.
    ports = Ports(AUTOMATIC_PORTS.start, options.num_models, options.devices_per_model)
    starts_here = not any(word.startswith(("--chdir", "-D")) for word in (options.slurm or "").split())
    check_jobs(make_jobs(commands, ports, None, keys="keys"), starts_here)
    return commands


def _open_what_is_closed() -> None:
    """Where a caller closed a standard stream, the next file would get its number, and what is printed with it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``codistill-launch``.

    Returns:
        0 when every model ended well, 1 when one failed, 128 + a signal's number; 2 (by exit) for a wrong setting.
    """
    _open_what_is_closed()
    argv = list(sys.argv[1:] if argv is None else argv)
    own, command = split_command(argv)
    parser = make_parser()
    options, unknown = parser.parse_known_args(own)
    if unknown:
        hint = "" if "--" in argv else "; the command to launch comes after --, as in --num-models 2 -- python train.py"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    words = [word for word in own if word not in ("--wait", "--dry-run", "--no-bits")]
    words = without_option(without_option(words, "--slurm"), "--link")
    words = [word.removeprefix(" ") for word in words] + ["--", *command]
    try:
        commands = plan_models(options, command)
        if options.dry_run:
            shown = show_plan(options, commands, words)
            if not options.no_bits:
                table = traffic_report(
                    commands,
                    options.plan_classes,
                    options.plan_rows,
                    options.plan_parameters,
                    options.plan_step_s,
                    options.link,
                )
                shown = f"{shown}\n\n{table}"
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="replace")  # a plan is to be read, whatever the locale lacks
            print(shown)
            return 0
        return execute(options, commands, words)
    except (ConfigError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
