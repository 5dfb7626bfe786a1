"""Owns the way from a plan to its end on each executor: ``--on local``, ``slurm`` or ``ray``.

The same options, placeholders, keys, logs, restarts, signals and exit codes on all of them: one supervisor runs each.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fairseq_codistill.launch import slurm, slurm_batch
from fairseq_codistill.launch.child import Child
from fairseq_codistill.launch.deaths import Deaths
from fairseq_codistill.launch.kept_keys import KeptKeys
from fairseq_codistill.launch.local import local_jobs
from fairseq_codistill.launch.logs import default_log_dir, model_logs
from fairseq_codistill.launch.plan import Job, has_flag, make_jobs
from fairseq_codistill.launch.resources import TooFewDevicesError, pick_ports
from fairseq_codistill.launch.runtime import run_folder
from fairseq_codistill.launch.supervisor import Start, Supervisor
from fairseq_codistill.launch.traffic import without_option

Commands = Sequence[Sequence[str]]


def show_plan(options: argparse.Namespace, commands: Commands, words: Sequence[str]) -> str:
    """What ``--dry-run`` prints of the plan: commands of a shell, or the batch script.

    Args:
        options: the launcher's own.
        commands: of the models.
        words: of the launcher's command line, of which a batch script makes its own.

    Raises:
        ConfigError: it cannot work.
    """
    if options.on == "slurm" and not in_allocation(options):
        return _script(options, commands, words)
    if options.on == "slurm":
        jobs = _steps(options, commands, os.path.join(_folder(options, commands), "keys"))
    elif options.on == "ray":
        return f"# Ray says where each rank is, and on which devices, once it is there\n{_elsewhere(options, commands)}"
    else:
        try:
            jobs = local_jobs(commands, options.devices_per_model, options.base_port, options.share_devices)
        except TooFewDevicesError as error:  # the plan may be for another machine
            return f"# cannot run here: {error}\n{_elsewhere(options, commands)}"
    return _in_shell(jobs)


def _in_shell(jobs: Sequence[Job]) -> str:
    return "\n".join(f"# {job.label}\n{job.shell()}" for job in jobs)


def _elsewhere(options: argparse.Namespace, commands: Commands) -> str:
    """The plan on a machine that has all devices."""
    ports = pick_ports(len(commands), options.devices_per_model, options.base_port)
    on_cpu = has_flag(commands[0], "--cpu")
    devices = None if on_cpu else [str(index) for index in range(len(commands) * options.devices_per_model)]
    return _in_shell(make_jobs(commands, ports, devices))


def execute(options: argparse.Namespace, commands: Commands, words: Sequence[str]) -> int:
    """Run the plan to its end; arguments as for :func:`show_plan`.

    Returns:
        0 when every model ended well, 1 when one failed, 128 + a signal's number.

    Raises:
        ConfigError: it cannot work, and nothing has started.
        OSError: a folder cannot be written.
    """
    if options.on == "slurm":
        return _on_slurm(options, commands) if in_allocation(options) else _submit(options, commands, words)
    with contextlib.ExitStack() as stack:
        keys = os.path.join(stack.enter_context(run_folder(os.environ)), "keys")
        if options.on == "local":
            jobs = local_jobs(commands, options.devices_per_model, options.base_port, options.share_devices, keys)
            _make_keys(keys, options.num_models)
            return _supervise(options, commands, jobs, with_keys=_kept(keys, stack))
        from fairseq_codistill.launch.ray_cluster import placed  # loads Ray

        _make_keys(keys, options.num_models)
        cpus = options.cpus_per_device or 1
        launch = stack.enter_context(placed(commands, options.devices_per_model, cpus, options.ray_address, keys))
        return _supervise(options, commands, launch.jobs, launch.start, launch.jobs_here(), _kept(keys, stack))


def in_allocation(options: argparse.Namespace) -> bool:
    """Whether a launch on SLURM runs where it is, and asks for nothing."""
    return "SLURM_JOB_ID" in os.environ and options.slurm is None


def _kept(keys: str, stack: contextlib.ExitStack) -> Callable[[Job], Job]:
    kept = KeptKeys(keys, os.environ)
    stack.callback(kept.close)
    return kept.for_job


def _make_keys(folder: str, num_models: int) -> None:
    from fairseq_codistill.coordinator.transports.curve_keys import (
        make_keys,  # loads ZeroMQ, which a plan does not need
    )

    make_keys(folder, num_models)


def _folder(options: argparse.Namespace, commands: Commands) -> str:
    """Of a run on SLURM, on a file system that all nodes have."""
    if options.run_dir is not None:
        return str(options.run_dir)
    return default_log_dir(commands) or "."


def _keys(folder: str) -> str:
    return os.path.join(os.path.abspath(folder), "keys")


def _layout(options: argparse.Namespace) -> slurm.Layout:
    per_node = options.devices_per_node
    if per_node is None and in_allocation(options):
        per_node = _number(os.environ, "SLURM_NTASKS_PER_NODE")
        gpus = _number(os.environ, "SLURM_GPUS_ON_NODE") or 1
        if per_node == 1 and gpus > 1:  # one task is what is asked for where a task starts the others by itself
            per_node = min(gpus, options.devices_per_model)
    return slurm.make_layout(options.num_models, options.devices_per_model, per_node)


def _script(options: argparse.Namespace, commands: Commands, words: Sequence[str]) -> str:
    folder = _folder(options, commands)
    # By its whole path: the job may begin in another folder (sbatch --chdir) than who follows it is in.
    own = [f"--run-dir={os.path.abspath(folder)}", *without_option(words[: words.index("--")], "--run-dir")]
    launcher = [sys.executable, "-m", "fairseq_codistill.launch.cli", *own, *words[words.index("--") :]]
    return slurm_batch.batch_script(
        _layout(options),
        folder,
        options.slurm or "",
        options.grace_s,
        not has_flag(commands[0], "--cpu"),
        launcher,
        options.cpus_per_device,
    )


def _submit(options: argparse.Namespace, commands: Commands, words: Sequence[str]) -> int:
    folder = _folder(options, commands)
    if options.num_models > 1:
        slurm.check_keys(_keys(folder), options.num_models)  # before it waits in a queue
    job = slurm_batch.submit(_script(options, commands, words), folder)
    log = os.path.join(folder, f"slurm-{job}.log")
    print(f"[launch] job {job}: {_layout(options)}; its output: {log}", file=sys.stderr, flush=True)
    return slurm_batch.Follower(job, folder).run() if options.wait else 0


def _steps(options: argparse.Namespace, commands: Commands, keys: str) -> list[Job]:
    layout, job = _layout(options), os.environ["SLURM_JOB_ID"]
    nodes = slurm.allocation(os.environ)
    slurm.check_allocation(layout, nodes, job)
    port = slurm.pick_base_port(job, options.base_port)
    cores = options.cpus_per_device or _number(os.environ, "SLURM_CPUS_PER_TASK")
    memory = _number(os.environ, "SLURM_MEM_PER_NODE")
    return slurm.make_steps(commands, layout, nodes, port, keys, cores, _has_gpus(os.environ), memory)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """What the job asked for. Cores: before SLURM 23.11 a step does not take them over, and a task of it has one."""
    given = environment.get(name, "")
    return int(given) if given.isdecimal() else None


def _has_gpus(environment: Mapping[str, str]) -> bool:
    """Whether SLURM deals them out; the shell of an ``salloc`` has not all of these variables."""
    names = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS", "SLURM_JOB_GPUS")
    return any(environment.get(name, "0") not in ("", "0") for name in names)


def _on_slurm(options: argparse.Namespace, commands: Commands) -> int:
    folder, job = _folder(options, commands), os.environ["SLURM_JOB_ID"]
    keys = _keys(folder)
    slurm.leave_exit_code(folder, job, None)
    code = 2
    try:
        jobs = _steps(options, commands, keys)
        if options.num_models > 1:
            slurm.prepare_keys(keys, options.num_models)
        code = _supervise(options, commands, jobs)
        return code
    finally:
        with contextlib.suppress(OSError):
            slurm.leave_exit_code(folder, job, code)


def _supervise(
    options: argparse.Namespace,
    commands: Commands,
    jobs: Sequence[Job],
    start: Start = Child,
    jobs_here: Sequence[Job] = (),
    with_keys: Callable[[Job], Job] = lambda job: job,
) -> int:
    """Until all jobs have ended; ``with_keys`` sees to the keys of a job before it reads them."""

    def start_with_keys(job: Job, *arguments: Any) -> Child:
        return start(with_keys(job), *arguments)

    log_dir = default_log_dir(commands) if options.log_dir is None else options.log_dir
    with model_logs(None if log_dir == "none" else log_dir, options.num_models) as logs:
        for job in jobs:
            print(f"[launch] {job.label}: {job.shell()}", file=sys.stderr, flush=True)
        return Supervisor(
            jobs,
            options.grace_s,
            options.fail_fast,
            options.max_restarts,
            logs,
            Deaths(jobs_here or jobs, options.num_models, options.devices_per_model, with_keys),
            start_with_keys,
        ).run()
