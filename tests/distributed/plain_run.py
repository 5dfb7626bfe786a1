"""One model of a run of a plain loop, in a process of its own; its losses, unrounded, go to a JSON file."""

import json
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

from fairseq_codistill import Codistiller, CoordinatedBatches

NUM_CLASSES = 7


def make_dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, NUM_CLASSES, (50,), generator=generator)
    return TensorDataset(inputs, targets, torch.arange(50))


def make_model(index: int) -> torch.nn.Module:
    """Dropout, so that every random number counts; and of another size for each, unless checkpoints travel."""
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16 + index), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(16 + index, NUM_CLASSES)
    )


def make_twin(index: int) -> torch.nn.Module:
    return make_model(0)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def main(path: str, model_index: int, num_updates: int, batch_size: int, settings: dict) -> None:
    torch.manual_seed(3 + model_index)
    model = (make_twin if settings.get("exchange") == "checkpoints" else make_model)(model_index)
    optimizer = make_optimizer(model)
    losses: list[float] = []
    dataset = make_dataset()
    loader = DataLoader(dataset, batch_sampler=CoordinatedBatches(len(dataset), batch_size, data_seed=2))
    with Codistiller(model_index=model_index, **settings) as peers:
        peers.meet(model, loader)
        while len(losses) < num_updates:
            for inputs, targets, ids in loader:
                loss = peers.loss(model(inputs), targets, ids, forward=lambda copy, inputs=inputs: copy(inputs))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                if len(losses) == num_updates:
                    break
    with open(path, "w") as file:
        json.dump(losses, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
