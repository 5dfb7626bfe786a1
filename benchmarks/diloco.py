"""DiLoCo by torchft for slow_links.py: ``codistill-vision`` on one device a host, averaged every so many updates.

    python benchmarks/diloco.py LIGHTHOUSE_HOST:PORT OWN_HOST INDEX PERIOD[/FRAGMENTS] [options of codistill-vision]

With fragments it is Streaming DiLoCo (Douillard et al. 2025): each of them is averaged once a period, at its own time,
and sent while DELAY_UPDATES more updates are made. Fragments stay in fp32: torchft quantises them with kernels of
Triton on the stream of an accelerator, and a CPU with gloo has neither.

Index 0 starts the lighthouse as well. The outer optimizer is that of the paper of DiLoCo (Douillard et al. 2023): SGD
with Nesterov's momentum 0.9 and learning rate 0.7. Needs torchft in the environment.
"""

import os
import sys
from datetime import timedelta

import torch
from fairseq_codistill.vision import train
from fairseq_codistill.vision.distributed import Place
from fairseq_codistill.vision.engine import Stop, Trainer
from fairseq_codistill.vision.options import parse_options
from torch import nn
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

from fairseq_codistill.config import ConfigError

DELAY_UPDATES = 5  # tau of the paper
LONG = timedelta(hours=1)  # a link of 1 Mbit/s takes minutes for one average


def fragments_of(model: nn.Module, number: int) -> list[nn.Module]:
    """The layers of a model in so many fragments of about as many parameters: the next one goes to the smallest."""
    if number == 1:
        return [model]
    layers = [layer for child in model.children() for layer in (child if isinstance(child, nn.Sequential) else [child])]
    fragments, sizes = [nn.ModuleList() for _ in range(number)], [0] * number
    for layer in sorted(layers, key=lambda layer: -_size(layer)):
        least = sizes.index(min(sizes))
        fragments[least].append(layer)
        sizes[least] += _size(layer)
    return list(fragments)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    """Train until a signal comes."""
    lighthouse, own_host, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    period, num_fragments = (int(number) for number in f"{sys.argv[4]}/1".split("/")[:2])
    server = None
    if index == 0:
        server = LighthouseServer(bind=f"[::]:{lighthouse.rpartition(':')[2]}", min_replicas=2, join_timeout_ms=60_000)
    config = parse_options(sys.argv[5:])
    if config.is_codistilled:
        raise ConfigError("--codistill-num-models is above 1; DiLoCo averages one model")
    store = TCPStore(own_host, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=LONG),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=2,
        use_async_quorum=False,
        timeout=LONG,
        quorum_timeout=LONG,
        rank=0,
        world_size=1,
        store_addr=own_host,
        store_port=store.port,
        lighthouse_addr=f"http://{lighthouse}",
        replica_id=f"model{index}",
        hostname=own_host,
        init_sync=False,
    )

    class Averaged(Trainer):
        """Trains inside DiLoCo's hooks on the optimizer."""

        def train(self, *arguments: object) -> str:
            fragments = fragments_of(self.model, num_fragments)
            outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in fragments]
            delay = DELAY_UPDATES if num_fragments > 1 else 0
            with DiLoCo(
                manager, fragments, self.stored_optimizer, outer,
                sync_every=period, use_bucketization=True, fragment_sync_delay=delay,
            ):  # fmt: skip
                return super().train(*arguments)  # type: ignore[arg-type]

    train.Trainer = Averaged  # type: ignore[misc]
    stop = Stop()
    os.makedirs(config.save_dir, exist_ok=True)
    try:
        train.run(config, Place(0, 1, torch.device("cpu")), stop)
    finally:
        manager.shutdown(wait=False)
        if server is not None:
            server.shutdown()


if __name__ == "__main__":
    main()
