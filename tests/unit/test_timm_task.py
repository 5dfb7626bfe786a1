"""timm's task in one process: what it refuses of a loader and of options. Training is in tests/distributed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("timm.task")
from timm.data import AugMixDataset, FastCollateMixup
from torchvision.datasets import FakeData

from fairseq_codistill import CodistillationConfig, ConfigError
from fairseq_codistill.integrations.timm_batches import are_mixed_elsewhere, coordinate
from fairseq_codistill.integrations.timm_task import CodistillationTask


def task_of(collate_fn=None, targets=None, **options):
    targets = torch.arange(8) % 2 if targets is None else targets
    images = TensorDataset(torch.zeros(8, 3, 4, 4), targets)
    loader = DataLoader(images, batch_size=4, collate_fn=collate_fn)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    config = CodistillationConfig(**options)
    return CodistillationTask(model, nn.CrossEntropyLoss(), loader=loader, config=config), loader


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codistill_parts": "2"}, "--codistill-parts is '2'"),
        ({"codistill_lookahead": True}, "--codistill-lookahead"),
        ({"codistill_peer_weights": "validation"}, "--codistill-peer-weights is 'validation'"),
    ],
)
def test_what_a_task_cannot_do_is_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        task_of(**options)


def test_images_that_are_mixed_in_the_loop_are_refused_and_those_of_the_loader_are_not():
    task, loader = task_of()
    images, _ = next(iter(loader))
    with pytest.raises(ConfigError, match="leave --no-prefetcher off, or --mixup"):
        task(images, torch.full((4, 2), 0.5))
    assert task(images, torch.tensor([0, 1, 0, 1]))["loss"].requires_grad
    mixed = FastCollateMixup(mixup_alpha=0.2, num_classes=2)
    _, loader = task_of(lambda samples: mixed(samples))
    assert are_mixed_elsewhere(loader)
    _, loader = task_of(mixed)
    assert not are_mixed_elsewhere(loader)


def test_a_data_set_may_give_vectors():
    task, loader = task_of(targets=torch.full((8, 2), 0.5))
    images, targets = next(iter(loader))
    assert task(images, targets)["loss"].requires_grad


class Stream(IterableDataset):
    """With a length, as timm's own has one."""

    def __iter__(self):
        return iter([])

    def __len__(self):
        return 8


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Stream(), "has a dataset that is a stream"),
        (AugMixDataset(FakeData(8), num_splits=2), "leave --aug-splits off"),
    ],
)
def test_images_that_no_number_can_draw_are_refused_before_training(images, message):
    with pytest.raises(ConfigError, match=message):
        coordinate(DataLoader(images, batch_size=4), 1, lambda: None)
