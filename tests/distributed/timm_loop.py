"""timm's train script in small, as its own is with ``--task`` left alone: ``timm_loop.py OUT SEED [options]``.

Nothing here knows of codistillation: the tests put the two lines of the page into it. Every loss, what the batches were
and the checkpoint of the end are written to OUT.
"""

import argparse
import logging
import os
import signal

import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader
from timm.models import load_checkpoint  # noqa: F401 - as the script has it
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from torch import nn

NUM_SAMPLES, BATCH_SIZE, NUM_CLASSES, SIZE = 42, 4, 5, 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Images(torch.utils.data.Dataset):
    transform = None

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (NUM_SAMPLES, 12, 12, 3), generator=generator, dtype=torch.uint8)
        self.targets = torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator).tolist()

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index].numpy())), self.targets[index]


class Classifier(nn.Sequential):
    num_classes = NUM_CLASSES

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, NUM_CLASSES)
        )


def make_loader(distributed=False, workers=0, mixup=0.0, reprob=0.0, multi_epochs=False):
    collate = (
        {"collate_fn": FastCollateMixup(mixup_alpha=mixup, num_classes=NUM_CLASSES, label_smoothing=0.0)}
        if mixup
        else {}
    )
    return create_loader(
        Images(), input_size=(3, SIZE, SIZE), batch_size=BATCH_SIZE, is_training=True, mean=MEAN, std=STD,
        num_workers=workers, distributed=distributed, device=torch.device("cpu"), re_prob=reprob,
        use_multi_epochs_loader=multi_epochs, **collate,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("seed", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--torchcompile", default="")
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--resume", default="")
    parser.add_argument("--save", default="", help="after every epoch, under this name")
    parser.add_argument("--kill-after-epoch", type=int, default=-1)
    parser.add_argument("--until", default="", help="end once this file exists")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if args.distributed:
        torch.distributed.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(args.seed + rank)
    model = Classifier()
    if args.distributed:  # timm leaves it to DistributedDataParallel
        for value in model.state_dict().values():
            torch.distributed.broadcast(value, 0)
    loader_train = make_loader(args.distributed, args.workers, args.mixup)
    train_loss_fn = nn.CrossEntropyLoss()
    if True:  # timm's script distils here, if told to
        # Standard classification task
        task = ClassificationTask(
            model=model,
            criterion=train_loss_fn,
            verbose=False,
        )
    if args.model_ema:
        task.setup_ema(decay=0.9)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.02, momentum=0.9, weight_decay=0.0)
    start_epoch = 0
    if args.resume:
        start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed()
    task.train()
    losses, batches = [], []
    num_updates = 0

    def checkpoint(epoch):
        state = {**task.get_checkpoint_state(), "optimizer": optimizer.state_dict(), "epoch": epoch, "version": 2}
        return {**state, **(task.get_checkpoint_state(ema=True) if task.has_ema() else {})}

    for epoch in range(start_epoch, args.epochs):
        for number, (input, target) in enumerate(loader_train):
            is_last = (number + 1) % args.grad_accum_steps == 0 or number + 1 == len(loader_train)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                result = task(input, target)
            (result["loss"] / args.grad_accum_steps).backward()
            losses.append(float(result["loss"].detach()))
            batches.append((float(input.double().sum()), target.tolist()))
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
                num_updates += 1
                task.update_ema(step=num_updates)
        if args.save:
            torch.save(checkpoint(epoch), args.save + ".new")
            os.replace(args.save + ".new", args.save)
        if epoch == args.kill_after_epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.path.exists(args.until):
            break
    if rank == 0:
        torch.save(
            {**checkpoint(args.epochs - 1), "losses": losses, "batches": batches, "keys": sorted(result)}, args.out
        )
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
