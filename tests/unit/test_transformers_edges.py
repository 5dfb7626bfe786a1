"""The Hugging Face trainer's adapter at its edges: other outputs of models, loaders of one's own, the end."""

from types import SimpleNamespace

import pytest
import torch
from helpers import free_ports
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("transformers")
from transformers import TrainingArguments

from fairseq_codistill import Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import NoPeersError
from fairseq_codistill.integrations.transformers_arguments import CodistillArguments
from fairseq_codistill.integrations.transformers_outputs import logits_of, token_loss
from fairseq_codistill.integrations.transformers_trainer import CodistillTrainer

CLASSES, LENGTH = 5, 3
DATA = [{"inputs": [1.0 * (i % 3), i % 2], "labels": [i % CLASSES] * LENGTH} for i in range(10)]


class Plain(torch.nn.Module):
    """A model that is none of the library's; it never knows the labels where the trainer keeps them.

    Args:
        form: logits -> what it gives.
    """

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = torch.nn.Linear(2, CLASSES * LENGTH), form

    def forward(self, inputs, labels=None):
        logits = self.layer(inputs).view(-1, LENGTH, CLASSES)
        if labels is None:
            return self.form(logits)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


FORMS = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits: (logits, torch.ones(len(logits), LENGTH, 7)),
    "mapping": lambda logits: {"logits": logits},
}


def trainer_of(
    tmp_path, form="tensor", kind=CodistillTrainer, codistill=None, compute_loss_func=token_loss, **settings
):
    torch.manual_seed(0)
    settings = {"save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 4, **settings}
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    model = Plain(FORMS[form])
    given = {"train_dataset": DATA, "compute_loss_func": token_loss, "codistill": codistill}
    return kind(model=model, args=args, **given)


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_whatever_a_model_gives_without_its_labels(tmp_path, monkeypatch, form):
    asked = []
    monkeypatch.setattr(CodistillationConfig, "is_taught", True)

    def term(self, logits, ids, mask=None, *, targets=None, forward=None, **_):
        asked.append((logits, targets, forward(trainer.model)))
        return logits.sum() * 0

    monkeypatch.setattr(Codistiller, "term", term)
    trainer = trainer_of(tmp_path, form, learning_rate=0.0)
    trainer.train()
    assert len(asked) == 2
    for logits, targets, of_copy in asked:
        assert (logits.shape, targets.shape) == ((4, LENGTH, CLASSES), (4, LENGTH))
        assert torch.equal(logits, of_copy)  # a copy is asked as the model is, and understood alike


def test_the_loss_stands_before_the_logits_where_the_model_was_given_the_labels():
    loss, logits = torch.tensor(1.0), torch.zeros(2, 3, 5)
    assert logits_of((loss, logits)) is logits
    assert logits_of((logits, loss), has_loss=False) is logits
    for outputs, has_loss in (((logits,), True), ((), False), ({"loss": loss}, True)):
        with pytest.raises(ConfigError, match="no logits to exchange, only"):
            logits_of(outputs, has_loss)
    assert logits_of(SimpleNamespace(logits=logits)) is logits
    with pytest.raises(ConfigError, match="no logits to exchange, only SimpleNamespace"):
        logits_of(SimpleNamespace())


def test_the_loss_of_classifiers_of_sequences_is_that_of_their_samples():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert float(token_loss({"logits": logits}, labels, torch.tensor(3))) == pytest.approx(float(expected) / 3)


class Twice(CodistillTrainer):
    """As R-Drop does."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        first = super().compute_loss(model, inputs, *args, **kwargs)
        return first + super().compute_loss(model, inputs, *args, **kwargs)


def test_a_batch_whose_loss_is_asked_for_twice_has_its_term_once(tmp_path, monkeypatch):
    terms = []
    monkeypatch.setattr(CodistillationConfig, "is_taught", True)
    monkeypatch.setattr(Codistiller, "term", lambda self, logits, *_, **__: terms.append(1) or logits.sum() * 0)

    trainer = trainer_of(tmp_path, kind=Twice, gradient_accumulation_steps=2, max_steps=1)
    trainer.compute_loss_func = None  # which takes the labels out of a batch
    trainer.train()
    assert len(terms) == 2


class OwnLoader(CodistillTrainer):
    def get_train_dataloader(self):
        return DataLoader(DATA, batch_size=4)


class OwnLoaderAfterOurs(OwnLoader):
    def get_train_dataloader(self):
        CodistillTrainer.get_train_dataloader(self)
        return DataLoader(DATA, batch_size=4, collate_fn=self.data_collator)


@pytest.mark.parametrize("kind", [OwnLoader, OwnLoaderAfterOurs])
def test_a_loader_of_ones_own_is_refused_before_it_trains_without_the_term(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(CodistillationConfig, "is_taught", True)
    with pytest.raises(ConfigError, match=r"get_train_dataloader\(\) gives another loader than the trainer's own"):
        trainer_of(tmp_path, kind=kind).train()


def test_a_stream_that_knows_its_length_is_refused_by_name(tmp_path):
    class Stream(IterableDataset):
        def __len__(self):
            return 10

        def __iter__(self):
            return iter(DATA)

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ConfigError, match="train_dataset is a stream"):
        CodistillTrainer(model=Plain(FORMS["tensor"]), args=args, train_dataset=Stream())


def test_a_training_at_its_end_needs_nobody_and_one_before_it_does(tmp_path, caplog):
    trainer_of(tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-2/rng_state.pth").unlink()  # random numbers of NumPy, which are not what this is about
    ports = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    options = CodistillArguments(
        codistill_num_models=2, codistill_model_index=0, codistill_addresses=ports, codistill_start_timeout=0.5
    )
    with caplog.at_level("INFO"):
        again = trainer_of(tmp_path, codistill=options)
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert "nothing is left to train, so no other model is needed" in caplog.text
    with pytest.raises(NoPeersError):
        trainer_of(tmp_path, codistill=options, max_steps=3).train(resume_from_checkpoint=True)
