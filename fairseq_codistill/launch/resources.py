"""Owns what a launch needs of the machine: ports that are free, and devices to share out.

Nothing here starts a process or opens a connection; a port is tried and let go again.
"""

import dataclasses
import random
import socket
from collections.abc import Callable, Mapping, Sequence

from fairseq_codistill.config import ConfigError

HOST = "127.0.0.1"
MAX_PORT = 65535
# Below the ports that Linux gives to outgoing connections (from 32768), so that none is taken by chance.
AUTOMATIC_PORTS = range(20000, 32000)


@dataclasses.dataclass(frozen=True)
class Ports:
    """A block of free ports: X for each of n models, then one rendezvous port a model.

    ``base + model · X`` is the port of the model's rank 0; rank r listens on that + r.
    """

    base: int
    num_models: int
    devices_per_model: int

    @staticmethod
    def num_needed(num_models: int, devices_per_model: int) -> int:
        return num_models * devices_per_model + num_models

    def listen(self, model: int) -> int:
        return self.base + model * self.devices_per_model

    def rendezvous(self, model: int) -> int:
        return self.base + self.num_models * self.devices_per_model + model

    @property
    def addresses(self) -> str:
        """The value of ``--codistill-addresses``."""
        return ",".join(f"{HOST}:{self.listen(model)}" for model in range(self.num_models))


def pick_ports(num_models: int, devices_per_model: int, base_port: int | None = None) -> Ports:
    """Find a block of ports that are free now, or check the one that starts at ``base_port``.

    Raises:
        ConfigError: a port of the given block is taken or out of range, or no free block was found.
    """
    num_needed = Ports.num_needed(num_models, devices_per_model)
    if base_port is not None:
        last = base_port + num_needed - 1
        if base_port < 1 or last > MAX_PORT:
            raise ConfigError(
                f"--base-port is {base_port}; {num_needed} ports from there on must lie between 1 and {MAX_PORT}"
            )
        for port in range(base_port, last + 1):
            if not is_free(port):
                raise ConfigError(
                    f"--base-port is {base_port}: ports {base_port} to {last} are needed and port {port} is taken; "
                    "give another base port, or leave the option out to have free ones picked"
                )
        return Ports(base_port, num_models, devices_per_model)
    if num_needed >= len(AUTOMATIC_PORTS):
        raise ConfigError(f"{num_models} models of {devices_per_model} need {num_needed} ports, more than there are")
    for _ in range(200):
        base = random.randrange(AUTOMATIC_PORTS.start, AUTOMATIC_PORTS.stop - num_needed)
        if all(is_free(port) for port in range(base, base + num_needed)):
            return Ports(base, num_models, devices_per_model)
    raise ConfigError(f"no {num_needed} free ports in a row were found on {HOST}; give some with --base-port")


def is_free(port: int) -> bool:
    """Whether nobody listens on that port of this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def visible_devices(
    command: Sequence[str], environment: Mapping[str, str], count_devices: Callable[[], int]
) -> list[str] | None:
    """The CUDA devices that may be used, by the names that CUDA_VISIBLE_DEVICES takes.

    Args:
        command: the command of a model; ``--cpu`` in it decides.
        environment: of the launcher.
        count_devices: asked only where CUDA_VISIBLE_DEVICES says nothing.

    Returns:
        None when training runs on the CPU: ``--cpu`` was given, or there is no device.
    """
    if "--cpu" in command:
        return None
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(index) for index in range(count_devices())] or None
    devices: list[str] = []
    for name in (name.strip() for name in listed.split(",")):
        if not name or name.startswith("-"):  # CUDA itself stops reading here
            break
        devices.append(name)
    return devices or None


ON_CPU = "add --cpu to the command (a program of your own: CUDA_VISIBLE_DEVICES= before codistill-launch)"


class TooFewDevicesError(ConfigError):
    """This machine has fewer devices than the plan takes."""


def split_devices(devices: Sequence[str], num_models: int, devices_per_model: int, share: bool = False) -> list[str]:
    """Cut the devices into one contiguous group a model.

    Args:
        devices: names, in the order to use.
        share: start again at the first device when they run out, so that models share devices.

    Returns:
        the value of CUDA_VISIBLE_DEVICES of each model.

    Raises:
        TooFewDevicesError: as it says.
    """
    num_needed = num_models * devices_per_model
    if len(devices) < (devices_per_model if share else num_needed):
        raise TooFewDevicesError(
            f"--num-models {num_models} with --devices-per-model {devices_per_model} needs {num_needed} devices, and "
            f"{len(devices)} are visible ({','.join(devices)}); lower one of them, "
            + (f"or {ON_CPU}" if share else f"let models share devices with --share-devices, or {ON_CPU}")
        )
    chosen = [devices[index % len(devices)] for index in range(num_needed)]
    return [
        ",".join(chosen[model * devices_per_model : (model + 1) * devices_per_model]) for model in range(num_models)
    ]
