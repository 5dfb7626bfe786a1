"""A training loop of one's own with Codistiller, as a user would write it: ``plain_loop.py OUT SEED [options]``.

Its place among the models comes from the environment. Losses, parameters and the random state of the end are written to
OUT as they are; ``--resume`` goes on from there. torchrun's variables make it one rank of several.
"""

import argparse
import logging
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fairseq_codistill import Codistiller, CoordinatedBatches

NUM_SAMPLES, BATCH_SIZE, NUM_CLASSES, NUM_FEATURES = 70, 8, 5, 6
NUM_SHARED, SHARED_BATCH_SIZE = 20, 6


def make_data(num_samples=NUM_SAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, NUM_FEATURES, generator=generator)
    targets = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    return TensorDataset(inputs, targets, torch.arange(num_samples))


def make_model(dropout):
    return nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, NUM_CLASSES))


class Slow(nn.Module):
    """Takes its time for every sample, forward and backward, and no processor."""

    def __init__(self, ms_per_sample):
        super().__init__()
        self.seconds = ms_per_sample * 1e-3

    def forward(self, logits):
        def sleep(gradient):
            time.sleep(self.seconds * len(gradient))

        time.sleep(self.seconds * len(logits))
        if logits.requires_grad:
            logits.register_hook(sleep)
        return logits


def make_teacher(entry):
    """With dropout, which a teacher must not have."""
    seed, weight = entry.split(":")
    torch.manual_seed(int(seed))
    return make_model(0.5), float(weight)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("seed", type=int)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--update-freq", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--global-generator", action="store_true", help="let the loader draw from torch's own")
    parser.add_argument("--kill-after", type=int, default=0)
    parser.add_argument("--until", default="", help="end once this file exists")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--save-on-sigterm", action="store_true")
    parser.add_argument("--split", action="store_true", help="forward and backward in parts")
    parser.add_argument("--ms-per-sample", type=float, default=0.0, help="of the forward pass, and of the backward one")
    parser.add_argument("--teacher", action="append", default=[], help="SEED:WEIGHT of a model that never changes")
    parser.add_argument("--own-data", type=int, default=0, help="so many samples of this model's own")
    parser.add_argument("--transfer", action="store_true", help="exchange batches of a shared set of 20 samples")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    teachers = [make_teacher(entry) for entry in options.teacher]
    torch.manual_seed(options.seed)
    model = make_model(options.dropout)
    if options.ms_per_sample:
        logging.basicConfig(level=logging.INFO)
        model.append(Slow(options.ms_per_sample))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data, data_seed = make_data(), 7
    if options.own_data:
        data, data_seed = make_data(options.own_data, options.seed), options.seed
    batches = CoordinatedBatches(len(data), BATCH_SIZE, data_seed=data_seed)
    # A loader draws a number from the global generator at each iteration, unless it has one of its own: a loop that is
    # resumed in the middle of an epoch would go on with other dropout.
    generator = None if options.global_generator else torch.Generator()
    loader = DataLoader(data, batch_sampler=batches, num_workers=options.workers, generator=generator)
    shared = None
    if options.transfer:
        samples = make_data(NUM_SHARED, 99)
        order = CoordinatedBatches(len(samples), SHARED_BATCH_SIZE, data_seed=7)
        shared = DataLoader(samples, batch_sampler=order, generator=torch.Generator())
    losses = []
    peers = Codistiller(update_freq=options.update_freq, teachers=teachers)
    if options.resume and os.path.exists(options.out):
        state = torch.load(options.out, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        peers.load_state_dict(state["peers"])
        torch.set_rng_state(state["random"])
        losses = state["losses"]
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model

    def is_enough():
        found = torch.tensor(float(os.path.exists(options.until)))
        if options.until and dist.is_initialized():
            dist.all_reduce(found)  # all ranks after the same step, though one sees it a moment earlier
        return bool(found)

    def save(done):
        if dist.is_initialized() and dist.get_rank() != 0:
            return  # ranks of a model share the file
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "peers": peers.state_dict(),
                "random": torch.get_rng_state(),
                "losses": losses,
                "done": done,
            },
            options.out + ".new",
        )
        os.replace(options.out + ".new", options.out)

    asked = []

    def take(number, frame):
        asked.append(number)
        peers.interrupt("SIGTERM")

    if options.save_on_sigterm:
        signal.signal(signal.SIGTERM, take)
    with peers:
        peers.meet(wrapped, loader, transfer=shared, fixed_inputs=True)
        while batches.elapsed < options.batches and not asked and not is_enough():
            for inputs, targets, ids in loader:
                if options.split:
                    loss = peers.forward_backward(
                        wrapped, inputs, targets, ids, backward=lambda loss: (loss / options.update_freq).backward(),
                        scaled=lambda loss: loss / options.update_freq,
                    )  # fmt: skip
                else:
                    loss = peers.loss(
                        wrapped(inputs), targets, ids, forward=lambda copy, inputs=inputs: copy(inputs),
                        transfer=lambda batch: (model(batch[0]), batch[2]),
                    )  # fmt: skip
                    (loss / options.update_freq).backward()
                losses.append((batches.elapsed, loss.item()))
                if batches.elapsed % options.update_freq == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                print(batches.elapsed, peers.figures()["codistill_peers"], flush=True)
                if options.save_every and batches.elapsed % options.save_every == 0:
                    save(False)
                if options.kill_after and batches.elapsed == options.kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if asked or peers.skip() or batches.elapsed >= options.batches or is_enough():
                    break
        save(True)
    if dist.is_initialized():
        dist.destroy_process_group()
    if asked:
        sys.exit(128 + asked[0])


if __name__ == "__main__":
    main()
