"""DiLoCo by torchft for slow_links.py: ``codistill-vision`` on one device a host, averaged every so many updates.

    python benchmarks/diloco.py LIGHTHOUSE_HOST:PORT OWN_HOST INDEX PERIOD [options of codistill-vision]

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
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

from fairseq_codistill.config import ConfigError

LONG = timedelta(hours=1)  # a link of 1 Mbit/s takes minutes for one average


def main() -> None:
    """Train until a signal comes."""
    lighthouse, own_host, index, period = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
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
            outer = torch.optim.SGD(self.model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
            fragments = [self.model]
            with DiLoCo(manager, fragments, self.stored_optimizer, outer, sync_every=period, use_bucketization=True):
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
