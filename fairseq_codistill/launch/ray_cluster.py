"""Owns a launch on a Ray cluster: a placement group a model, an actor a rank, and where each of them listens.

Models are placed, each on one node, spread over nodes. Restarts, logs, signals and exit codes are those of a local
launch, whose supervisor runs this one too. Ranks inside a model are torch.distributed's. Ray is imported here only.
"""

import contextlib
import dataclasses
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.child import Child
from fairseq_codistill.launch.lines import Lines
from fairseq_codistill.launch.plan import TORCHRUN, Job, has_flag, introduced, rank_command, relay_of
from fairseq_codistill.launch.programs import fairseq_arguments
from fairseq_codistill.launch.ray_child import RankOnRay
from fairseq_codistill.launch.ray_rank import KEYS, Rank, with_keys

PLACE_S = 60.0  # for a cluster that is busy to give what the plan needs
RETURN_S = 300.0  # for a model that lost its node to get another one, which may have to be started first
RETRY_S = 1.0
REACH_S = 10.0
OF_THE_HOST = ("CUDA_VISIBLE_DEVICES", "HOSTNAME", "RAY_", "TMPDIR", "XDG_")  # variables that do not travel


def import_ray() -> Any:
    """Ray.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
        import ray.util
    except ImportError as error:
        raise ConfigError(
            f"--on ray: Ray cannot be imported ({error}); run: pip install 'fairseq-codistill[ray]'"
        ) from error
    return ray


class Cluster:
    """Where a launch is placed.

    Args:
        num_models: n.
        devices_per_model: X.
        on_cpu: a device is a core, not a GPU, whatever the nodes have.
        cpus_per_device: cores that Ray sets aside for a rank.
        address: of a running cluster; None starts one on this machine.

    Attributes:
        on_cpu: a device is a core: so it was said, or no node has a GPU.

    Raises:
        ConfigError: there is no such cluster, or the plan does not fit.
    """

    def __init__(
        self, num_models: int, devices_per_model: int, on_cpu: bool, cpus_per_device: int, address: str | None
    ):
        self.ray = import_ray()
        self._num_models, self._devices = num_models, devices_per_model
        self._groups: list[Any] = []
        # One of our own has the cores that the plan asks for: as with a local launch, ranks on the CPU may share them.
        cores = max(os.cpu_count() or 1, num_models * devices_per_model * cpus_per_device)
        own: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False} if address is None else {}
        _check_reach(address)
        try:
            self.ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--ray-address is {address!r}: {error}; give that of a running cluster") from error
        self.on_cpu = on_cpu or not any(node["Resources"].get("GPU") for node in self.ray.nodes() if node["Alive"])
        self._need = {"CPU": float(cpus_per_device)} | ({} if self.on_cpu else {"GPU": 1.0})
        self._remote = self.ray.remote(max_concurrency=4, max_restarts=0)(Rank)
        self._targets = self._fit()

    def _fit(self) -> list[str]:
        """The node of each model: always the one with the most room, so that models are spread.

        Raises:
            ConfigError: some model fits nowhere.
        """
        nodes = [node for node in self.ray.nodes() if node["Alive"]]

        def room(node: Mapping[str, Any]) -> int:
            return int(min(node["Resources"].get(name, 0.0) // much for name, much in self._need.items()))

        left = {node["NodeID"]: room(node) for node in nodes}
        targets = []
        for model in range(self._num_models):
            best = max(left, key=lambda node: left[node], default=None)
            if best is None or left[best] < self._devices:
                each = " and ".join(f"{much:g} {name}" for name, much in self._need.items())
                rooms = ", ".join(f"{node['NodeManagerAddress']}: {room(node)}" for node in nodes) or "no node"
                raise ConfigError(
                    f"--num-models {self._num_models} with --devices-per-model {self._devices} does not fit the Ray "
                    f"cluster: no node has room for model {model}. A device is {each}, a model is on one node, and the "
                    f"nodes have room for so many devices: {rooms}. Lower one of the two, or add nodes"
                )
            left[best] -= self._devices
            targets.append(best)
        return targets

    def place(self) -> None:
        """Get a placement group for every model.

        Raises:
            ConfigError: others have what the plan needs.
        """
        for target in self._targets:
            bundles = [dict(self._need) for _ in range(self._devices)]
            self._groups.append(
                self.ray.util.placement_group(bundles, strategy="STRICT_PACK", _soft_target_node_id=target)
            )
        _, waiting = self.ray.wait(
            [group.ready() for group in self._groups], num_returns=self._num_models, timeout=PLACE_S
        )
        if waiting:
            raise ConfigError(
                f"--on ray: {len(waiting)} of {self._num_models} models were not placed within {PLACE_S:g} s: others "
                f"use the cluster (free: {self.ray.available_resources()}); wait, or lower --num-models"
            )

    def rank(self, model: int, rank: int) -> Any:
        """A new actor in the place of that rank."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._groups[model], placement_group_bundle_index=rank)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(OF_THE_HOST) and name not in TORCHRUN
        }
        options = {"num_cpus": self._need["CPU"], "num_gpus": self._need.get("GPU", 0.0)}
        return self._remote.options(scheduling_strategy=strategy, **options).remote(os.getcwd(), environment)

    def where(self, actor: Any) -> tuple[str, list[str]]:
        """Address of the node of an actor, and the GPUs that it has been given."""
        found: tuple[str, list[str]] = self.ray.get(actor.__ray_call__.remote(_whereabouts), timeout=PLACE_S)
        return found

    def rank_again(self, model: int, rank: int, give_up: Callable[[], bool]) -> tuple[Any, str, list[str]]:
        """A new actor for a rank that is started again, its address and its GPUs, once Ray has a place for it.

        While Ray has not noticed yet that a node is lost, it puts the actor there and the actor dies: another is made.

        Raises:
            OSError: there was no place for it in time, or it is not wanted any more.
        """
        errors = self.ray.exceptions
        deadline, why = time.monotonic() + RETURN_S, "no node has room"
        while not give_up() and time.monotonic() < deadline:
            actor = self.rank(model, rank)
            try:
                asked = actor.__ray_call__.remote(_whereabouts)
                while not give_up() and time.monotonic() < deadline:
                    if self.ray.wait([asked], timeout=RETRY_S)[0]:
                        return actor, *self.ray.get(asked)
            except errors.RayError as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
            self.ray.kill(actor)
            time.sleep(RETRY_S)
        raise OSError(f"Ray had no place for it within {RETURN_S:g} s ({why}); add a node")

    def close(self) -> None:
        """Give everything back; a cluster of our own ends."""
        for group in self._groups:
            with contextlib.suppress(Exception):
                self.ray.util.remove_placement_group(group)
        self.ray.shutdown()


def _check_reach(address: str | None) -> None:
    """Ray itself would look for minutes, and end the process.

    Raises:
        ConfigError: nobody listens there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # none, or a name of Ray's own: auto, local
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ConfigError(f"--ray-address is {address!r}: {error}; give that of a running cluster") from error


def _whereabouts(_rank: Rank) -> tuple[str, list[str]]:
    import ray
    import ray.util

    return ray.util.get_node_ip_address(), [str(gpu) for gpu in ray.get_gpu_ids()]


class RayLaunch:
    """Plans the jobs of a launch, now that their places are known, and starts them.

    Args:
        cluster: that has placed the models.
        commands: of :func:`~fairseq_codistill.launch.plan.model_commands`.
        devices_per_model: X.
        keys: folder of the run's keys, here.
    """

    def __init__(self, cluster: Cluster, commands: Sequence[Sequence[str]], devices_per_model: int, keys: str):
        self.cluster = cluster
        self._keys = keys
        self._actors = {
            (model, rank): cluster.rank(model, rank)
            for model in range(len(commands))
            for rank in range(devices_per_model)
        }
        places = {place: cluster.where(actor) for place, actor in self._actors.items()}
        self._hosts = {model: places[model, 0][0] for model in range(len(commands))}
        self._fixed = {model for model, command in enumerate(commands) if not relay_of(command)}
        ports: dict[int, int] = {}
        taken: list[int] = []
        for model in range(len(commands)):
            asked = self._actors[model, 0].pick_ports.remote(devices_per_model + 1, taken)
            ports[model] = cluster.ray.get(asked, timeout=PLACE_S)
            taken += range(ports[model], ports[model] + devices_per_model + 1)
        addresses = ",".join(f"{self._hosts[model]}:{ports[model]}" for model in ports)
        self.jobs: list[Job] = []
        for model, command in enumerate(commands):
            words, environment = introduced(command, model, len(commands), addresses, KEYS)
            if cluster.on_cpu and fairseq_arguments(command) is not None and not has_flag(command, "--cpu"):
                words.append("--cpu")
            gpus = [gpu for rank in range(devices_per_model) for gpu in places[model, rank][1]]
            if gpus:  # each sees those of all ranks, as torch.distributed expects it
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            for rank in range(devices_per_model):
                master, port = self._hosts[model], str(ports[model] + devices_per_model)
                full, ranks = rank_command(words, str(rank), str(rank), devices_per_model, master, port)
                number = rank if devices_per_model > 1 else None
                self.jobs.append(Job(model, number, tuple(full), {**environment, **ranks}))

    def jobs_here(self) -> list[Job]:
        """The jobs with the launcher's own folder of the keys, for what it does in the place of a model."""
        return [with_keys(job, self._keys) for job in self.jobs]

    def start(
        self,
        job: Job,
        output: Lines,
        log: Lines | None,
        ended: "queue.SimpleQueue[Child | int]",
        grace_s: float,
    ) -> Child:
        """A job in its place; for the supervisor."""
        keys = self.keys_of(job.model)
        return RankOnRay(self.cluster.ray, self.actor_of, keys, job, output, log, ended, grace_s)

    def actor_of(self, job: Job, give_up: Callable[[], bool]) -> tuple[Any, Job]:
        """That of the plan, the first time; then a new one, where Ray finds room. And the job as it is there.

        Args:
            job: the rank.
            give_up: asked while there is no room.

        Raises:
            OSError: there is none, or it is on another host, where nobody looks for the model.
        """
        actor = self._actors.pop((job.model, job.rank or 0), None)
        if actor is not None:
            return actor, job
        actor, host, gpus = self.cluster.rank_again(job.model, job.rank or 0, give_up)
        # Ranks of one model look for each other there as well.
        if host != self._hosts[job.model] and (job.model in self._fixed or job.rank is not None):
            self.cluster.ray.kill(actor)
            raise OSError(
                f"its place is now on {host}, and the others look for it at {self._hosts[job.model]}; models of one "
                "device that use --codistill-relay can move"
            )
        if gpus and job.rank is None:
            job = dataclasses.replace(job, environment={**job.environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus)})
        return actor, job

    def keys_of(self, model: int) -> dict[str, bytes]:
        """What one model needs of the key set: no private key of another one."""
        found = {}
        for name in sorted(os.listdir(self._keys)):
            if name.endswith(".key") or name in (f"model-{model}.key_secret", "run.key_secret"):
                with open(os.path.join(self._keys, name), "rb") as file:
                    found[name] = file.read()
        return found


@contextlib.contextmanager
def placed(
    commands: Sequence[Sequence[str]], devices_per_model: int, cpus_per_device: int, address: str | None, keys: str
) -> Iterator[RayLaunch]:
    """A launch whose models have their places, given back at the end.

    Raises:
        ConfigError: the plan does not fit.
    """
    ray = import_ray()
    try:
        cluster = Cluster(len(commands), devices_per_model, has_flag(commands[0], "--cpu"), cpus_per_device, address)
        try:
            cluster.place()
            yield RayLaunch(cluster, commands, devices_per_model, keys)
        finally:
            cluster.close()
    finally:
        ray.shutdown()
