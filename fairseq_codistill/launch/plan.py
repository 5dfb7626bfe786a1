"""Owns what the launcher will start: one command a model, or a rank, with its devices, ports and placeholders.

Nothing here starts a process, and nothing imports fairseq or torch: a plan is made in milliseconds.
"""

import dataclasses
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence

from fairseq_codistill.config import ConfigError, environment_name
from fairseq_codistill.launch.programs import fairseq_arguments, takes_options
from fairseq_codistill.launch.resources import HOST, Ports, split_devices

SET_BY_LAUNCHER = ("--codistill-num-models", "--codistill-model-index", "--codistill-addresses")
SET_FOR_FAIRSEQ = (
    "--distributed-world-size",
    "--distributed-rank",
    "--distributed-init-method",
    "--distributed-port",
    "--distributed-no-spawn",
    "--device-id",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One process to start.

    Attributes:
        model: which model it trains, from 0.
        rank: its rank inside the model, or None where one process is the whole model (it may start more itself).
        command: program and arguments, no shell.
        environment: what is added to the launcher's own environment.
    """

    model: int
    rank: int | None
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"model {self.model}" if self.rank is None else f"model {self.model} rank {self.rank}"

    def shell(self) -> str:
        """The job as one line for a POSIX shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*settings, shlex.join(self.command)])


def fill_placeholders(argument: str, model: int, num_models: int) -> str:
    """Replace ``{model}``, ``{model+K}`` and ``{num_models}``; every other brace stays.

    Raises:
        ConfigError: something like ``{model*2}`` that looks like a placeholder and is none.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name == "num_models":
            return str(num_models)
        offset = re.fullmatch(r"model(?:\+(\d+))?", name)
        if offset is None:
            raise ConfigError(
                f"{argument!r}: {match.group(0)} is no placeholder; use {{model}}, {{model+1}}, {{num_models}}"
            )
        return str(model + int(offset.group(1) or 0))

    return re.sub(r"\{((?:model|num_models)(?:[ +*/%-][^{}:]*)?)\}", value, argument)


def last_value(command: Sequence[str], flag: str) -> str | None:
    """The value of ``--flag value`` or ``--flag=value`` that counts, which is the last one; None where not given."""
    found = None
    for position, argument in enumerate(command):
        if argument == flag and position + 1 < len(command):
            found = command[position + 1]
        elif argument.startswith(flag + "="):
            found = argument[len(flag) + 1 :]
    return found


def has_flag(command: Sequence[str], flag: str) -> bool:
    return any(argument == flag or argument.startswith(flag + "=") for argument in command)


def resolve_program(command: Sequence[str]) -> list[str]:
    """Make the first word something that can be started: scripts by this Python, tools found beside it.

    Raises:
        ConfigError: there is no such program or script.
    """
    program, arguments = command[0], list(command[1:])
    if program.endswith(".py"):
        if os.path.isfile(program):
            return [sys.executable, program, *arguments]
        if program == "vision/train.py":  # installed, and started from another folder than the repository
            return [sys.executable, "-m", "fairseq_codistill.vision.train", *arguments]
        raise ConfigError(f"{program!r}: no such script in {os.getcwd()}; give its path from there")
    if shutil.which(program):
        return list(command)
    beside = os.path.join(os.path.dirname(sys.executable), program)
    if shutil.which(beside):
        return [beside, *arguments]
    raise ConfigError(f"{program!r}: no such program on PATH or beside {sys.executable}; check the word after --")


def model_commands(
    command: Sequence[str], num_models: int, model_args: Mapping[int, Sequence[str]] | None = None
) -> list[list[str]]:
    """The command of every model, placeholders filled, before anything of the launcher's is added.

    Args:
        command: what follows ``--``.
        num_models: n.
        model_args: arguments that only one model gets, by model index; they come last and so win.

    Raises:
        ConfigError: models that would be one and the same, a flag that is the launcher's, an unknown program.
    """
    if num_models < 1:
        raise ConfigError(f"--num-models is {num_models}; it must be at least 1")
    if not command:
        raise ConfigError(
            "there is no command to start; put it after --, as in: codistill-launch --num-models 2 -- fairseq-train ..."
        )
    model_args = model_args or {}
    for model in model_args:
        if not 0 <= model < num_models:
            raise ConfigError(f"--model-args {model}: there are {num_models} models, from 0 to {num_models - 1}")
    resolved = resolve_program(command)
    commands = [
        [fill_placeholders(argument, model, num_models) for argument in [*resolved, *model_args.get(model, ())]]
        for model in range(num_models)
    ]
    for arguments in commands:
        _check_flags(arguments)
    _check_distinct(commands)
    return commands


def _check_flags(command: Sequence[str]) -> None:
    for flag in SET_BY_LAUNCHER:
        if has_flag(command, flag):
            raise ConfigError(
                f"{flag} is in the command; codistill-launch sets it, so leave it out (or start each model yourself, "
                "without the launcher)"
            )
    if fairseq_arguments(command) is not None:
        for flag in SET_FOR_FAIRSEQ:
            if has_flag(command, flag):
                raise ConfigError(
                    f"{flag} is in the command; codistill-launch sets it from --devices-per-model: leave it out"
                )


def _check_distinct(commands: Sequence[Sequence[str]]) -> None:
    """Two models that start and drop out alike are one model, and two in one folder overwrite each other.

    A program of the user's own may take its seed from elsewhere, such as ``CODISTILL_MODEL_INDEX``, so one without
    ``--seed`` is left to the meeting, which refuses models of the same parameters.
    """
    fairseq = fairseq_arguments(commands[0]) is not None
    seeds: dict[str, int] = {}
    folders: dict[str, int] = {}
    for model, command in enumerate(commands):
        seed = last_value(command, "--seed") or ("1" if fairseq else "its default" if takes_options(command) else None)
        if seed is not None and seed in seeds:
            raise ConfigError(
                f"--seed is {seed} for models {seeds[seed]} and {model}: they would start equal and stay equal; "
                "put --seed {model+1} in the command, or a --seed in --model-args"
            )
        if seed is not None:
            seeds[seed] = model
        folder = last_value(command, "--save-dir") or ("checkpoints" if fairseq else None)
        if folder is None or has_flag(command, "--no-save"):
            continue
        folder = os.path.normpath(folder)
        if folder in folders:
            raise ConfigError(
                f"--save-dir is {folder!r} for models {folders[folder]} and {model}: they would overwrite each other's "
                "checkpoints; put --save-dir checkpoints/{model} in the command"
            )
        folders[folder] = model


def make_jobs(
    commands: Sequence[Sequence[str]],
    ports: Ports,
    devices: Sequence[str] | None,
    share_devices: bool = False,
    keys: str | None = None,
) -> list[Job]:
    """Complete the commands: who each model is, where all listen, which devices it has.

    fairseq starts its ranks on GPUs itself. Ranks on the CPU, and those of any other program, are started here; the
    latter find their rank in the variables that torchrun sets.

    Args:
        commands: of :func:`model_commands`.
        ports: their n and X are those of the run.
        devices: of :func:`~fairseq_codistill.launch.resources.visible_devices`; None for the CPU.
        keys: folder of the run's keys, for commands that do not name one.
    """
    world_size = ports.devices_per_model
    if world_size < 1:
        raise ConfigError(f"--devices-per-model is {world_size}; it must be at least 1")
    groups = None if devices is None else split_devices(devices, len(commands), world_size, share_devices)
    jobs: list[Job] = []
    for model, command in enumerate(commands):
        identity = dict(zip(SET_BY_LAUNCHER, (str(len(commands)), str(model), ports.addresses), strict=True))
        wants_keys = (
            not has_flag(command, "--codistill-keys") and last_value(command, "--codistill-transport") != "gloo"
        )
        if keys is not None and len(commands) > 1 and wants_keys:
            identity["--codistill-keys"] = keys
        environment = {} if groups is None else {"CUDA_VISIBLE_DEVICES": groups[model]}
        base = list(command)
        if takes_options(command):
            base += [word for pair in identity.items() for word in pair]
        else:
            environment |= {environment_name(flag): value for flag, value in identity.items()}
        rendezvous = ports.rendezvous(model)
        if fairseq_arguments(command) is None:
            if world_size == 1:
                jobs.append(Job(model, None, tuple(base), environment))
            for rank in range(world_size if world_size > 1 else 0):
                jobs.append(Job(model, rank, tuple(base), environment | _torchrun(rank, world_size, rendezvous)))
            continue
        base += ["--distributed-world-size", str(world_size)]
        if groups is None and not has_flag(command, "--cpu"):
            base.append("--cpu")
        if world_size > 1:
            # Given for GPUs too: fairseq would derive the port from the job id of Slurm, the same for every model.
            base += ["--distributed-init-method", f"tcp://{HOST}:{rendezvous}"]
        if world_size == 1 or groups is not None:
            jobs.append(Job(model, None, tuple(base), environment))
            continue
        base.append("--distributed-no-spawn")
        for flag, value in (("--distributed-backend", "gloo"), ("--ddp-backend", "legacy_ddp")):
            if not has_flag(command, flag):
                base += [flag, value]
        jobs += [Job(model, rank, (*base, "--distributed-rank", str(rank))) for rank in range(world_size)]
    return jobs


def _torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }
