"""Owns what the launcher will start: one command a model, or a rank, with its devices, ports and placeholders.

Nothing here starts a process, and nothing imports fairseq or torch: a plan is made in milliseconds.
"""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence

from fairseq_codistill.config import ConfigError
from fairseq_codistill.environment import environment_name
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

# What torchrun sets. No process inherits them: those of a launcher that was itself started by torchrun, or in a
# container that sets them, say nothing of the models.
TORCHRUN = frozenset(
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR "
    "MASTER_PORT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT".split()
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One process to start.

    Attributes:
        model: which model it trains, from 0.
        rank: its rank inside the model, or None where one process is the whole model (it may start more itself).
        command: program and arguments, no shell.
        environment: what is added to the launcher's own environment, which goes without the variables of torchrun.
        labels_ranks: the process is several ranks, and begins each line with the number of one: ``1: text``.
        failure: how a line begins by which the process itself says that it failed, whatever its exit code is then.
        end_signal: that asks the process to end.
    """

    model: int
    rank: int | None
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels_ranks: bool = False
    failure: bytes = b""
    end_signal: int = signal.SIGTERM

    @property
    def label(self) -> str:
        return f"model {self.model}" if self.rank is None else f"model {self.model} rank {self.rank}"

    def shell(self) -> str:
        """The job as one line for a POSIX shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*settings, shlex.join(self.command)])


FORMAT = r":(?:0\d+d?|d|[<>^=]\d+d?)"  # of {model:02d}; {model:resnet} may be a dictionary of Hydra's


def fill_placeholders(argument: str, model: int, num_models: int) -> str:
    """Replace ``{model}``, ``{model+K}`` and ``{num_models}``; every other brace stays.

    Raises:
        ConfigError: something like ``{model*2}`` or ``{model:02d}`` that looks like a placeholder and is none.
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

    return re.sub(r"\{((?:model|num_models)(?:[ +*/%-][^{}:]*|" + FORMAT + r")?)\}", value, argument)


def last_value(command: Sequence[str], flag: str) -> str | None:
    """The value of ``--flag value`` or ``--flag=value`` that counts, which is the last one; None where not given."""
    found = None
    for position, argument in enumerate(command):
        if _flag_of(argument) != flag:
            continue
        _, equals, value = argument.partition("=")
        if equals:
            found = value
        elif position + 1 < len(command):
            found = command[position + 1]
    return found


def has_flag(command: Sequence[str], flag: str) -> bool:
    return any(_flag_of(argument) == flag for argument in command)


def _flag_of(argument: str) -> str:
    """The flag of an argument; Hugging Face's parser takes ours with ``_`` for ``-`` as well."""
    flag = argument.partition("=")[0]
    return flag.replace("_", "-") if flag.startswith("--codistill_") else flag


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
    if len({has_flag(arguments, "--cpu") for arguments in commands}) > 1:
        raise ConfigError("--cpu is given for some models only; all of a launch have GPUs, or none: give it to all")
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
        place = os.path.realpath(folder)  # however it is written
        if place in folders:
            raise ConfigError(
                f"--save-dir is {os.path.normpath(folder)!r} for models {folders[place]} and {model}: they would "
                "overwrite each other's checkpoints; put --save-dir checkpoints/{model} in the command"
            )
        folders[place] = model


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
        base, environment = introduced(command, model, len(commands), ports.addresses, keys)
        if groups is not None:
            environment = {"CUDA_VISIBLE_DEVICES": groups[model], **environment}
        rendezvous = ports.rendezvous(model)
        if fairseq_arguments(command) is None:
            if world_size == 1:
                jobs.append(Job(model, None, tuple(base), environment | alone()))
            for rank in range(world_size if world_size > 1 else 0):
                jobs.append(Job(model, rank, tuple(base), environment | torchrun(rank, world_size, rendezvous)))
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
        base += ["--distributed-no-spawn", *gloo_flags(command)]
        jobs += [Job(model, rank, (*base, "--distributed-rank", str(rank))) for rank in range(world_size)]
    return jobs


def introduced(
    command: Sequence[str], model: int, num_models: int, addresses: str, keys: str | None
) -> tuple[list[str], dict[str, str]]:
    """A model's command and environment with who it is, where all listen, and the keys: in options, where it has them.

    Args:
        command: of :func:`model_commands`.
        model: which it is.
        num_models: n.
        addresses: ``--codistill-addresses``; left out where the models use a relay.
        keys: as for :func:`make_jobs`.
    """
    identity = dict(zip(SET_BY_LAUNCHER, (str(num_models), str(model), addresses), strict=True))
    if relay_of(command):
        del identity["--codistill-addresses"]
    named = setting_of(command, "--codistill-keys") or relay_of(command)  # which knows the keys that it was given
    if keys is not None and num_models > 1 and not named and setting_of(command, "--codistill-transport") != "gloo":
        identity["--codistill-keys"] = keys
    if takes_options(command):
        return [*command, *(word for pair in identity.items() for word in pair)], {}
    return list(command), {environment_name(flag): value for flag, value in identity.items()}


def relay_of(command: Sequence[str]) -> str:
    """The relay that a model uses, as its command or the environment says; empty without one."""
    return setting_of(command, "--codistill-relay")


def setting_of(command: Sequence[str], flag: str) -> str:
    """What an option is set to in a command, or in the environment where the command looks there; empty: nowhere."""
    return last_value(command, flag) or ("" if takes_options(command) else os.environ.get(environment_name(flag), ""))


def rank_command(
    command: Sequence[str], rank: str, local_rank: str, world_size: int, master: str, port: str
) -> tuple[list[str], dict[str, str]]:
    """A command and its environment as one rank of a model, whose process is this rank alone.

    Args:
        command: with everything else that it gets; ``--cpu`` in it decides which backend fairseq uses.
        rank: a number, or what stands for it until it is known; ``local_rank`` likewise.
        local_rank: index of its device among those that it sees.
        world_size: X.
        master: host where the ranks find each other.
        port: likewise.
    """
    if fairseq_arguments(command) is None:
        return list(command), (alone() if world_size == 1 else torchrun(rank, world_size, port, local_rank, master))
    found = [*command, "--distributed-world-size", str(world_size)]
    if world_size > 1:
        found += ["--distributed-init-method", f"tcp://{master}:{port}", "--distributed-no-spawn"]
        found += ["--distributed-rank", rank, "--device-id", local_rank]
        found += gloo_flags(command) if has_flag(command, "--cpu") else []
    return found, {}


def gloo_flags(command: Sequence[str]) -> list[str]:
    """What ranks on the CPU need of fairseq, where the command does not say it."""
    wanted = (("--distributed-backend", "gloo"), ("--ddp-backend", "legacy_ddp"))
    return [word for flag, value in wanted if not has_flag(command, flag) for word in (flag, value)]


def alone() -> dict[str, str]:
    """What a model of one device is told: timm would take the tasks of a job of SLURM around it for its ranks."""
    return {"WORLD_SIZE": "1"} if "SLURM_NTASKS" in os.environ else {}


def torchrun(
    rank: int | str, world_size: int, port: int | str, local_rank: int | str | None = None, master: str = HOST
) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank if local_rank is None else local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
    }
