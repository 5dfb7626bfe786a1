"""Owns a launch inside an allocation of SLURM: which nodes are whose, and the job step that each model is.

A step is one ``srun``, which the supervisor of a local launch runs like any other command: restarts, logs, signals and
exit codes are the same. Ranks inside a model are torch.distributed's; SLURM tells each its number. How an allocation is
asked for is :mod:`~fairseq_codistill.launch.slurm_batch`'s.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch import slurm_task
from fairseq_codistill.launch.plan import Job, has_flag, introduced, rank_command

PORTS = range(20000, 31000)
PORTS_A_JOB = 64
# Of srun, whose exit code is 0 all the same (seen with 22.05).
NODE_FAILURE = b"srun: error: Node failure on "
RANK, LOCAL_RANK = "{rank}", "{local_rank}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How models lie on nodes: each on whole nodes, or several on one.

    Attributes:
        num_models: n.
        devices_per_model: X.
        devices_per_node: devices, and so tasks, that the launch uses on a node.
    """

    num_models: int
    devices_per_model: int
    devices_per_node: int

    @property
    def models_per_node(self) -> int:
        """0 where a model has one node or more."""
        return self.devices_per_node // self.devices_per_model if self.devices_per_model < self.devices_per_node else 0

    @property
    def nodes_per_model(self) -> int:
        return 1 if self.models_per_node else self.devices_per_model // self.devices_per_node

    @property
    def tasks_per_node(self) -> int:
        """Of one model."""
        return self.devices_per_model // self.nodes_per_model

    @property
    def num_nodes(self) -> int:
        if self.models_per_node:
            return -(-self.num_models // self.models_per_node)
        return self.num_models * self.nodes_per_model

    def place(self, model: int) -> tuple[range, int]:
        """The nodes of a model, by number, and which of the models of its node it is."""
        if self.models_per_node:
            node, slot = divmod(model, self.models_per_node)
            return range(node, node + 1), slot
        return range(model * self.nodes_per_model, (model + 1) * self.nodes_per_model), 0

    def __str__(self) -> str:
        each = "several models a node" if self.models_per_node else f"{self.nodes_per_model} node(s) a model"
        return (
            f"{self.num_models} model(s) of {self.devices_per_model} device(s) on {self.num_nodes} node(s) of "
            f"{self.devices_per_node}, {each}"
        )


def make_layout(num_models: int, devices_per_model: int, devices_per_node: int | None) -> Layout:
    """The layout of a launch; a model a node where nothing is said.

    Raises:
        ConfigError: models and nodes do not divide.
    """
    devices_per_node = devices_per_model if devices_per_node is None else devices_per_node
    if devices_per_node < 1:
        raise ConfigError(f"--devices-per-node is {devices_per_node}; it must be at least 1")
    large, small = max(devices_per_model, devices_per_node), min(devices_per_model, devices_per_node)
    if large % small:
        raise ConfigError(
            f"--devices-per-model {devices_per_model} with --devices-per-node {devices_per_node}: a model is on whole "
            "nodes, or several are on one; one of the two must divide by the other"
        )
    return Layout(num_models, devices_per_model, devices_per_node)


def allocation(environment: Mapping[str, str]) -> list[str]:
    """Names of the nodes of the allocation that this process is in.

    Raises:
        ConfigError: SLURM does not say.
    """
    try:
        command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (KeyError, OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--on slurm: the nodes of this allocation are not known ({error!r})") from error


def check_allocation(layout: Layout, nodes: Sequence[str], job: str) -> None:
    """Whether the plan fits into it.

    Raises:
        ConfigError: too few nodes.
    """
    if len(nodes) < layout.num_nodes:
        raise ConfigError(
            f"--on slurm: the allocation {job} has {len(nodes)} node(s) ({' '.join(nodes)}), and the plan needs "
            f"{layout.num_nodes}: {layout}; ask for more nodes, or "
            f"lower --num-models or --devices-per-model; --devices-per-node is {layout.devices_per_node}"
        )


def pick_base_port(job: str, base_port: int | None) -> int:
    """First port on every node, by the number of the job, since two may share a node: blocks of 64, which come round
    after as many jobs as there are blocks."""
    if base_port is not None:
        return base_port
    number = int(job) if job.isdecimal() else 0
    return PORTS.start + number % (len(PORTS) // PORTS_A_JOB) * PORTS_A_JOB


def make_steps(
    commands: Sequence[Sequence[str]],
    layout: Layout,
    nodes: Sequence[str],
    base_port: int,
    keys: str | None = None,
    cpus_per_device: int | None = None,
    has_gpus: bool = False,
    memory_mb: int | None = None,
) -> list[Job]:
    """One step a model.

    Args:
        commands: of :func:`~fairseq_codistill.launch.plan.model_commands`.
        layout: that fits into ``nodes``.
        nodes: names.
        base_port: of every node, the ranks listen from there on; then comes a rendezvous port a model.
        keys: folder of the run's keys that all nodes see.
        cpus_per_device: cores of a task; None leaves it to SLURM.
        has_gpus: SLURM deals out those of a node.
        memory_mb: of the job on a node, which its first step would take whole; None where it has not asked for any.
    """
    hosts = {model: [nodes[node] for node in layout.place(model)[0]] for model in range(len(commands))}
    listen = {model: base_port + layout.place(model)[1] * layout.tasks_per_node for model in hosts}
    addresses = ",".join(f"{'+'.join(hosts[model])}:{listen[model]}" for model in hosts)
    steps = []
    for model, command in enumerate(commands):
        words, environment = introduced(command, model, len(commands), addresses, keys)
        # Not by its place on the node: nodes that are one machine, as in a test, would then meet at one port.
        port = (
            base_port
            + layout.devices_per_node
            + model % max(layout.models_per_node, PORTS_A_JOB - layout.devices_per_node, 1)
        )
        if layout.models_per_node and not has_gpus and not has_flag(command, "--cpu"):
            first = layout.place(model)[1] * layout.tasks_per_node
            own = _devices_of_node(layout)[first : first + layout.tasks_per_node]
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(own), **environment}
        words, ranks = rank_command(words, RANK, LOCAL_RANK, layout.devices_per_model, hosts[model][0], str(port))
        if ranks:
            ranks["LOCAL_WORLD_SIZE"] = str(layout.tasks_per_node)
            words = ["env", *(f"{name}={value}" for name, value in ranks.items()), *words]
        srun = [
            "srun", "--exact", "--kill-on-bad-exit=1", "--export=ALL",  # whatever the job itself was given
            "--nodes", str(layout.nodes_per_model),
            "--ntasks", str(layout.devices_per_model), "--ntasks-per-node", str(layout.tasks_per_node),
            "--nodelist", ",".join(hosts[model]),
        ]  # fmt: skip
        if cpus_per_device is not None:
            srun += ["--cpus-per-task", str(cpus_per_device)]
        if layout.models_per_node and has_gpus and not has_flag(command, "--cpu"):
            srun += ["--gpus-per-node", str(layout.tasks_per_node)]  # each sees its own
        if layout.models_per_node and memory_mb:
            srun += ["--mem", f"{memory_mb // layout.models_per_node}M"]
        is_several = layout.devices_per_model > 1
        srun += ["--label"] if is_several else []
        task = [sys.executable, "-I", "-S", slurm_task.__file__, *words]
        steps.append(Job(model, None, (*srun, *task), environment, is_several, NODE_FAILURE, signal.SIGUSR1))
    return steps


def _devices_of_node(layout: Layout) -> list[str]:
    """Where SLURM deals out none, nobody else keeps the models of a node apart.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES of the job names fewer than the plan takes.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not listed:
        return [str(index) for index in range(layout.devices_per_node)]
    names = [name.strip() for name in listed.split(",")]
    if len(names) < layout.devices_per_node:
        raise ConfigError(
            f"--devices-per-node is {layout.devices_per_node}, and CUDA_VISIBLE_DEVICES names {len(names)} ({listed}); "
            "lower the former, or name a device as often as models are to share it"
        )
    return names


def check_keys(folder: str, num_models: int) -> bool:
    """Whether the keys of the run are there already.

    Raises:
        ConfigError: there are some, and not for so many models.
    """
    from fairseq_codistill.coordinator.transports.curve_keys import load_launcher_keys  # loads ZeroMQ

    if not os.path.exists(os.path.join(folder, "model-0.key")):
        return False
    try:
        load_launcher_keys(folder, num_models)
    except ConfigError as error:
        raise ConfigError(
            f"{folder} holds keys that are not those of {num_models} models, so of another run: give this one a folder "
            f"of its own with --run-dir, or remove them ({error})"
        ) from error
    return True


def prepare_keys(folder: str, num_models: int) -> None:
    """Make the keys of the run, readable by its owner alone; a job that is started again finds its own.

    Raises:
        ConfigError: there are some, and not for so many models.
        OSError: the folder cannot be written.
    """
    from fairseq_codistill.coordinator.transports.curve_keys import make_keys  # loads ZeroMQ

    if not check_keys(folder, num_models):
        os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
        make_keys(folder, num_models)


def exit_path(folder: str, job: str) -> str:
    """Where a launch inside of job leaves its exit code for who waits for it."""
    return os.path.join(folder, f"slurm-{job}.exit")


def leave_exit_code(folder: str, job: str, code: int | None) -> None:
    """Leave it; None takes away that of an earlier start of the same job."""
    path = exit_path(folder, job)
    if code is None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return
    with open(path + ".tmp", "w", encoding="ascii") as file:
        file.write(f"{code}\n")
    os.replace(path + ".tmp", path)
