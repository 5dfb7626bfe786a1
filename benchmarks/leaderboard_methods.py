"""The methods of the leaderboard: models that teach each other, and workers that average. One process, one thread.

Bits are what one device hands over in an update, on average: of codistillation as counted, headers included; of the
others by the formula of an all_reduce, 2 x numbers x bits, of what a real run sends (no more is simulated than that).
What is learned, of which a method knows nothing, is a setting of leaderboard_tasks.py.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fairseq_codistill import Codistiller, CoordinatedBatches, with_next
from fairseq_codistill.sampling import Numbered
from fairseq_codistill.testing.stage import Stage

OUTER_RATE = 0.7  # DiLoCo (Douillard et al. 2023), whose momentum is 0.9, of Nesterov's kind


class Trainee:
    """A model with its optimizer, schedule and batches."""

    def __init__(self, setting: Any, train: Any, seed: int, index: int = 0, rank: int = 0, world_size: int = 1):
        torch.manual_seed(1000 * seed + index)
        self.setting, self.num_updates = setting, 0
        self.rank, self.world_size = rank, world_size
        self.model = setting.model()
        self.optimizer = setting.optimizer(self.model.parameters())
        self.batches = CoordinatedBatches(len(train), setting.batch_size, seed, rank=rank, world_size=world_size)
        self.loader = DataLoader(
            Numbered(train),
            batch_sampler=self.batches,
            collate_fn=setting.collate,
            generator=torch.Generator(),  # or else it draws from that of dropout at every pass
        )
        self.random_state: Tensor | None = None  # to go on with once the first batch is there

    def endless(self) -> Iterator[Any]:
        """(inputs, targets, ids) for ever; counted here, for what is fetched in advance is not trained on yet."""
        count = self.num_updates
        while True:
            self.batches.move_to(count)
            for batch, ids in self.loader:
                yield *self.setting.inputs(batch, count * self.world_size + self.rank), ids
                count += 1

    def save(self, file: Path) -> None:
        """For :meth:`load`."""
        state = self.model.state_dict(), self.optimizer.state_dict(), self.num_updates, torch.get_rng_state()
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)

    def load(self, file: Path) -> None:
        """Go on as if nothing had been interrupted."""
        model, optimizer, self.num_updates, self.random_state = torch.load(file)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.batches.move_to(self.num_updates)  # for meet()

    def step(self) -> None:
        """An update with the gradient that is there."""
        self.num_updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.rate_of(self.num_updates)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def supervised(setting: Any, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    """Smoothed cross entropy, the mean over rows."""
    return nn.functional.cross_entropy(setting.logits(model, inputs), targets, label_smoothing=setting.smoothing)


def codistil(
    setting: Any,
    train: Any,
    seed: int,
    num_models: int,
    dump: Path | None = None,
    weak_width: int = 0,
    told: Any = None,
    begun: Path | None = None,
    **settings: Any,
) -> tuple[list[nn.Module], float]:
    """n models that teach each other.

    Args:
        dump: file for the logits and targets of the last update of model 0.
        weak_width: of the last model, where it is to be a weak peer; it is not among the models that come back.
        begun: folder that keeps what models are at the end of the burn-in: until then all methods are the same. It is
            gone on from where all n are there, for models that begin apart would skip batches to meet.
        told: pairs by which the models say ten times in all how they do, for ``peer_weights="validation"``.

    Returns:
        the models, and bits an update of one device.
    """
    trainees: dict[int, Trainee] = {}
    mbit = [0.0] * num_models
    addresses = ",".join(f"memory:{index}" for index in range(num_models))
    of_models = [setting] * num_models
    if weak_width:
        of_models[-1] = dataclasses.replace(setting, width=weak_width)
    kept: list[Path] = []
    if begun is not None and setting.burn_in and told is None and settings.get("exchange") is None:
        until_then = [{**dataclasses.asdict(its), "alpha": 0.0} for its in of_models]
        kept = [
            begun / f"begun_{'_'.join(map(str, its.values()))}_{seed}_{index}.pt"
            for index, its in enumerate(until_then)
        ]
    have_begun = bool(kept) and all(file.exists() for file in kept)

    def play(index: int, transport: Any) -> Generator[None, None, None]:
        mine = trainees[index] = Trainee(of_models[index], train, seed, index)
        own = {"timeout": 5.0, "start_timeout": 5.0, "num_models": num_models, "addresses": addresses}
        own |= {"burn_in": setting.burn_in, "weight": setting.alpha, **settings}
        if have_begun:
            mine.load(kept[index])
        with Codistiller(rank=0, world_size=1, transport=transport, model_index=index, **own) as peers:
            peers.meet(mine.model, mine.loader, num_updates=setting.updates)
            yield
            for (inputs, targets, ids), following in with_next(mine.endless()):
                if mine.random_state is not None:
                    torch.set_rng_state(mine.random_state)
                    mine.random_state = None
                logits = setting.logits(mine.model, inputs)
                loss = peers.loss(
                    logits,
                    targets,
                    ids,
                    label_smoothing=setting.smoothing,
                    forward=lambda copy, x=inputs: setting.logits(copy, x),
                )
                if following is not None and settings.get("lookahead"):
                    peers.look_ahead(mine.model, *following)
                loss.backward()
                mine.step()
                if kept and mine.num_updates == setting.burn_in:
                    mine.save(kept[index])
                mbit[index] += peers.figures()["codistill_mbit"]
                if told is not None and mine.num_updates % max(1, setting.updates // 10) == 0:
                    peers.tell_validation(setting.figures(mine.model, told)["nll_bits"] * math.log(2))
                if mine.num_updates == setting.updates:
                    if dump is not None and index == 0:
                        torch.save((logits.detach(), targets), dump)
                    return
                yield

    stage = Stage(play, num_models)
    stage.play(1 + setting.updates)
    stage.close()
    strong = range(num_models - bool(weak_width))
    return [trainees[index].model for index in strong], 1e6 * sum(mbit) / num_models / setting.updates


def plain(setting: Any, train: Any, seed: int) -> tuple[list[nn.Module], float]:
    """One model on the batches that each codistilled model has."""
    mine = Trainee(setting, train, seed)
    batches = mine.endless()
    for _ in range(setting.updates):
        inputs, targets, _ = next(batches)
        supervised(setting, mine.model, inputs, targets).backward()
        mine.step()
    return [mine.model], 0.0


def averaged_gradients(
    setting: Any, train: Any, seed: int, squeeze: Callable[[list[list[Tensor]]], float]
) -> tuple[list[nn.Module], float]:
    """One model on two devices, whose gradients are averaged at every update.

    Args:
        squeeze: gradients of both devices, into the first of which it puts their mean -> bits of one device.
    """
    mine, other = (Trainee(setting, train, seed, 0, rank, 2) for rank in range(2))
    streams, bits = (mine.endless(), other.endless()), 0.0
    for _ in range(setting.updates):
        found = []
        for stream in streams:
            inputs, targets, _ = next(stream)
            supervised(setting, mine.model, inputs, targets).backward()
            found.append([parameter.grad.clone() for parameter in mine.model.parameters()])  # type: ignore[union-attr]
            mine.optimizer.zero_grad()
        bits += squeeze(found)
        for parameter, gradient in zip(mine.model.parameters(), found[0], strict=True):
            parameter.grad = gradient
        mine.step()
    return [mine.model], bits / setting.updates


def in_full(dtype: torch.dtype) -> Callable[[list[list[Tensor]]], float]:
    """All gradients, in a dtype."""

    def squeeze(found: list[list[Tensor]]) -> float:
        for one, other in zip(*found, strict=True):
            one.copy_((one.to(dtype) + other.to(dtype)) / 2)
        return 2.0 * sum(one.numel() for one in found[0]) * torch.finfo(dtype).bits

    return squeeze


class PowerSgd:
    """Gradients of matrices as two thin ones, with error feedback and warm start (Vogels et al. 2019)."""

    def __init__(self, rank: int):
        self.rank, self.errors, self.factors = rank, {}, {}  # type: ignore[var-annotated]

    def __call__(self, found: list[list[Tensor]]) -> float:
        numbers = 0
        for place, pair in enumerate(zip(*found, strict=True)):
            if pair[0].dim() < 2:
                pair[0].add_(pair[1]).div_(2)
                numbers += pair[0].numel()
                continue
            shape = pair[0].shape
            rows, columns = shape[0], pair[0][0].numel()  # of a convolution: what makes one channel is a row
            right = self.factors.get(
                place, torch.randn(columns, self.rank, generator=torch.Generator().manual_seed(place))
            )
            whole = [
                one.reshape(rows, columns) + self.errors.get((place, device), 0.0) for device, one in enumerate(pair)
            ]
            left = torch.linalg.qr(sum(one @ right for one in whole) / 2)[0]
            self.factors[place] = right = sum(one.t() @ left for one in whole) / 2
            mean = left @ right.t()
            for device, one in enumerate(whole):
                self.errors[place, device] = one - mean
            pair[0].copy_(mean.reshape(shape))
            numbers += self.rank * (rows + columns)
        return 2.0 * 32 * numbers


def averaged_parameters(
    setting: Any,
    train: Any,
    seed: int,
    period: int,
    begin: int = 0,
    outer: float | None = None,
    fragments: int = 1,
) -> tuple[list[nn.Module], float]:
    """Two workers that train apart from one start and average their parameters now and then.

    Args:
        period: updates between two averages of a parameter.
        begin: updates before the first, in which gradients are averaged (post-local SGD).
        outer: momentum of the SGD to which the mean is a gradient (DiLoCo); without it the mean is the parameters.
        fragments: parts of the model that are averaged in turns (Streaming DiLoCo).
    """
    workers = [Trainee(setting, train, seed, 0, rank, 2) for rank in range(2)]
    start = copy.deepcopy(workers[0].model)
    momentum = outer or 0.0
    outer_optimizer = torch.optim.SGD(start.parameters(), OUTER_RATE, momentum=momentum, nesterov=momentum > 0)
    shared, streams, numbers = list(start.parameters()), [worker.endless() for worker in workers], 0
    for update in range(1, setting.updates + 1):
        for worker, stream in zip(workers, streams, strict=True):
            inputs, targets, _ = next(stream)
            supervised(setting, worker.model, inputs, targets).backward()
        copies = list(zip(*(worker.model.parameters() for worker in workers), strict=True))
        if update <= begin:
            for pair in copies:
                mean = sum(one.grad for one in pair) / 2
                for one in pair:
                    one.grad = mean.clone()
                numbers += pair[0].numel()
        for worker in workers:
            worker.step()
        due = [part for part in range(fragments) if update % period == part * period // fragments]
        if update <= begin or (not due and update < setting.updates):
            continue
        with torch.no_grad():
            for place, (anchor, pair) in enumerate(zip(shared, copies, strict=True)):
                if update < setting.updates and place * fragments // len(shared) not in due:
                    continue
                mean = sum(one.data for one in pair) / 2
                anchor.grad = anchor.data - mean
                if outer is None:
                    anchor.data.copy_(mean)
                numbers += anchor.numel()
            if outer is not None:
                outer_optimizer.step()
            for anchor, pair in zip(shared, copies, strict=True):
                if anchor.grad is not None:
                    for one in pair:
                        one.data.copy_(anchor.data)
                anchor.grad = None
            if update == setting.updates:
                numbers += average_statistics([worker.model for worker in workers])
    return [workers[0].model], 2.0 * 32 * numbers / setting.updates


def average_statistics(models: list[nn.Module]) -> int:
    """Give all models the mean of what batch normalisation has gathered, which only evaluation uses.

    Returns:
        how many numbers that were.
    """
    learned = dict(models[0].named_parameters())
    states = [model.state_dict() for model in models]
    gathered = [name for name, one in states[0].items() if name not in learned and one.is_floating_point()]
    for name in gathered:
        mean = sum(state[name] for state in states) / len(states)
        for state in states:
            state[name].copy_(mean)
    return sum(states[0][name].numel() for name in gathered)
