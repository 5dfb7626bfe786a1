"""The Hugging Face trainer's adapter in one process: options, batches, refusals, what is left out."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fairseq_codistill import Codistiller
from fairseq_codistill.config import ConfigError
from fairseq_codistill.integrations.transformers_arguments import CodistillArguments
from fairseq_codistill.integrations.transformers_checkpoints import newest_checkpoint, read_state, write_state
from fairseq_codistill.integrations.transformers_data import IDS, Place, inputs_are_fixed
from fairseq_codistill.integrations.transformers_outputs import num_rows, rows_that_count
from fairseq_codistill.integrations.transformers_trainer import CodistillMixin, CodistillTrainer

DATA = [{"input_ids": [1, 2, i % 5], "labels": [1, 2, i % 5], "comment": "x"} for i in range(10)]


class Ordered(list):
    """Data that have an order of their own."""

    def settings_to_agree_on(self, num_batches, update_freq):
        return {}


class OfSeed7(Ordered):
    data_seed = 7


def trainer_of(tmp_path, train_dataset=DATA, codistill=None, eval_dataset=None, kind=CodistillTrainer, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = {"save_strategy": "no", "max_steps": 3, "per_device_train_batch_size": 4, **settings}
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, **sizes))
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return kind(model=model, args=args, codistill=codistill, **data)


def test_options_come_from_the_command_line_then_the_environment_then_the_defaults(monkeypatch):
    monkeypatch.setenv("CODISTILL_CODEC", "int8")
    monkeypatch.setenv("CODISTILL_INTERVAL", "3")
    parser = HfArgumentParser(CodistillArguments)
    (options,) = parser.parse_args_into_dataclasses(["--codistill-interval", "5", "--codistill_replica_wait", "true"])
    config = options.config()
    assert (config.codistill_codec, config.codistill_interval, config.codistill_timeout) == ("int8", 5, 300.0)
    assert config.codistill_replica_wait
    assert "--codistill-divergence" in parser.format_help()
    (options,) = parser.parse_args_into_dataclasses(["--codistill-teacher", "a", "--codistill-teacher", "b:0.5"])
    assert options.config().codistill_teacher == "a,b:0.5"
    (options,) = parser.parse_args_into_dataclasses(["--codistill-allow-identical-init", "--codistill-codec", "int8"])
    assert options.config().codistill_allow_identical_init
    (options,) = parser.parse_args_into_dataclasses(["--codistill-codec", "fp8"])
    with pytest.raises(ConfigError, match="--codistill-codec is 'fp8'"):
        options.config()


def test_batches_are_those_of_the_data_seed_whatever_the_seed(tmp_path):
    def ids(epoch, seed, **options):
        loader = trainer_of(tmp_path, seed=seed, codistill=CodistillArguments(**options)).get_train_dataloader()
        loader.set_epoch(epoch)
        return [batch[IDS] for batch in loader]

    first = ids(0, seed=1)
    assert first == ids(0, seed=2)
    assert first != ids(1, seed=1)
    assert first != ids(0, seed=1, codistill_data_seed=2)
    assert sorted(sum(first, [])) == list(range(10))


def test_alone_it_trains_as_the_stock_trainer_on_the_same_batches(tmp_path):
    mine = trainer_of(tmp_path)
    order = [DATA[index] for batch in mine.get_train_dataloader() for index in batch[IDS]]
    mine.train()
    torch.manual_seed(0)
    stock = trainer_of(tmp_path, train_dataset=order)
    stock = Trainer(model=stock.model, args=stock.args, train_dataset=order)
    stock._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(order)
    stock.train()
    pairs = zip(mine.model.parameters(), stock.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("train_dataset has no length", {"train_dataset": iter(DATA)}),
        ("train_sampling_strategy is 'group_by_length'", {"train_sampling_strategy": "group_by_length"}),
        ("auto_find_batch_size", {"auto_find_batch_size": True}),
        ("dispatch_batches", {"accelerator_config": {"dispatch_batches": True}}),
        ("--codistill-parts is '2'", {"codistill": CodistillArguments(codistill_parts="2")}),
        ("--codistill-lookahead is set", {"codistill": CodistillArguments(codistill_lookahead=True)}),
        (
            "--codistill-peer-weights is 'validation' and eval_strategy is 'no'",
            {"codistill": CodistillArguments(codistill_peer_weights="validation")},
        ),
        ("ignore_data_skip is on", {"ignore_data_skip": True}),
        (
            "dataloader_persistent_workers is on",
            {
                "train_dataset": Ordered(DATA),
                "train_sampling_strategy": "sequential",
                "dataloader_persistent_workers": True,
                "dataloader_num_workers": 1,
            },
        ),
        ("sample 0 of train_dataset is a list", {"train_dataset": [[1, 2]]}),
        (
            "train_dataset has batches of data seed 7, and --codistill-data-seed is 1",
            {"train_dataset": OfSeed7(DATA), "train_sampling_strategy": "sequential"},
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_trainer(tmp_path, what, settings):
    with pytest.raises(ConfigError, match=what):
        next(iter(trainer_of(tmp_path, **settings).get_train_dataloader()))


def test_rows_of_a_causal_model_are_shifted_and_padding_does_not_count():
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    targets, mask = rows_that_count({"labels": labels}, torch.zeros(2, 3, 11), shifts=True)
    assert targets[mask].tolist() == [6, 7, 9]
    targets, mask = rows_that_count({"labels": labels}, torch.zeros(2, 3, 11), shifts=False)
    assert targets[mask].tolist() == [5, 6, 7, 8, 9]
    targets, mask = rows_that_count({"shift_labels": labels}, torch.zeros(2, 3, 11), shifts=True)
    assert targets[mask].tolist() == [5, 6, 7, 8, 9]
    assert rows_that_count({"labels": torch.rand(2, 11)}, torch.zeros(2, 11), shifts=False) == (None, None)
    with pytest.raises(ConfigError, match=r"labels must be \(2, 4\)"):
        rows_that_count({"labels": labels}, torch.zeros(2, 4, 11), shifts=True)


def test_an_epoch_keeps_its_last_whole_update_and_what_is_left_out_counts():
    place = Place(num_batches=7, update_freq=2)  # three whole updates and one of a single batch
    assert [place.position(step) for step in range(6)] == [0, 2, 4, 6, 7, 9]
    assert [place.room(step, epoch=0) for step in range(5)] == [2, 1, 0, -1, 0]
    assert [Place(6, 2).room(step, epoch=1) for step in range(3, 6)] == [2, 1, 0]


def test_a_saved_model_teaches_alone_and_what_is_none_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    torch.manual_seed(5)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=5, **sizes))
    teacher.save_pretrained(tmp_path / "big")
    options = CodistillArguments(codistill_teacher=f"{tmp_path / 'big'}:2", codistill_divergence="kl")
    taught = trainer_of(tmp_path / "taught", codistill=options, logging_steps=1)
    taught.train()
    logged = [log["codistill_teacher_loss"] for log in taught.state.log_history if "codistill_teacher_loss" in log]
    assert len(logged) == 3
    assert min(logged) > 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="which is no saved model"):
        trainer_of(tmp_path / "x", codistill=CodistillArguments(codistill_teacher=str(tmp_path / "empty"))).train()


def test_an_evaluation_of_numbered_batches_learns_from_nobody(tmp_path):
    teacher = trainer_of(tmp_path).model
    teacher.save_pretrained(tmp_path / "teacher")
    options = CodistillArguments(codistill_teacher=str(tmp_path / "teacher"))
    numbered = [{**sample, IDS: index} for index, sample in enumerate(DATA)]
    student = trainer_of(tmp_path, codistill=options, eval_dataset=numbered, eval_strategy="steps", eval_steps=1)
    student.train()
    alone = trainer_of(tmp_path)
    alone.model.load_state_dict(student.model.state_dict())
    evaluated = [log["eval_loss"] for log in student.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 3
    assert evaluated[-1] == pytest.approx(alone.evaluate(DATA)["eval_loss"], rel=1e-5)


def test_the_peers_are_told_of_every_evaluation_in_training(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Codistiller, "tell_validation", lambda self, loss: told.append(loss))
    one = trainer_of(tmp_path, eval_dataset=DATA, eval_strategy="steps", eval_steps=1)
    one.compute_metrics = lambda _: {"ctc_loss": 70.0}
    one.evaluate()
    assert told == []  # nobody is there
    one.train()
    assert told == [log["eval_loss"] for log in one.state.log_history if "eval_loss" in log][-3:]
    assert len(told) == 3


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("epochs", [1, 2])
def test_training_ends_with_a_checkpoint_and_an_evaluation_wherever_updates_were_left_out(tmp_path, skipped, epochs):
    """An epoch of two whole updates and a short one, which is left out with any other."""
    trainer = trainer_of(
        tmp_path, eval_dataset=DATA, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3 * epochs,
        save_strategy="steps", save_steps=500, eval_strategy="steps", eval_steps=500,
    )  # fmt: skip
    in_last_epoch = 3 * (epochs - 1)
    trainer._num_to_skip = lambda: skipped if trainer.state.global_step == in_last_epoch else 0
    trainer.train()
    assert trainer.state.global_step == 3 * epochs
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{3 * epochs}"]
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [3 * epochs]


def test_what_is_due_at_a_short_update_that_is_left_out_is_done_at_the_end_of_its_epoch(tmp_path):
    trainer = trainer_of(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, save_strategy="steps",
        save_steps=3,
    )  # fmt: skip
    trainer._num_to_skip = lambda: int(trainer.state.global_step == 0)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_an_update_that_is_left_out_has_no_line_of_zeros_in_the_log(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1)
    trainer._num_to_skip = lambda: int(trainer.state.global_step == 0)
    trainer.train()
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    assert [step for step, _ in losses] == [2]
    assert losses[0][1] > 0


@pytest.mark.parametrize(
    ("main_input", "collator", "is_fixed"),
    [
        ("input_ids", SimpleNamespace(), True),
        ("input_ids", SimpleNamespace(mlm=False), True),
        ("input_ids", SimpleNamespace(mlm=True), False),
        ("input_ids", SimpleNamespace(plm_probability=0.2), False),
        ("pixel_values", SimpleNamespace(), False),
    ],
)
def test_only_of_text_that_nothing_masks_are_the_predictions_of_a_teacher_kept(main_input, collator, is_fixed):
    assert inputs_are_fixed(SimpleNamespace(main_input_name=main_input), collator) is is_fixed


def test_rows_are_counted_as_the_trainer_counts_what_it_divides_by():
    labels = torch.tensor([[1.0, 0.0, -100.0], [0.0, 1.0, 1.0]])  # classes of each sample, one not known
    assert num_rows({"labels": labels}, [0, 1], None) == 5
    assert num_rows({}, [0, 1], None) == 2
    assert num_rows({"labels": labels}, [0, 1], torch.tensor([[True, False, False]])) == 1


def test_a_training_that_is_at_its_end_and_started_again_makes_no_update(tmp_path, caplog):
    """Beside its last checkpoint lies one that it was killed in."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = trainer_of(tmp_path, **settings)
    first.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-9").mkdir()
    again = trainer_of(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert "checkpoint-9 has no whole trainer_state.json" in caplog.text
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_newest_checkpoint_is_the_newest_that_was_written_to_its_end(tmp_path):
    assert newest_checkpoint(str(tmp_path / "nowhere")) is None
    for name, text in {
        "checkpoint-9": "{}",
        "checkpoint-10": "{}",
        "checkpoint-11": '{"epoch',
        "checkpoint-x": "{}",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-12").mkdir()
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("has_copies", [False, True])
@pytest.mark.parametrize("left", [None, 0, 100])
def test_a_state_that_is_not_whole_is_told_and_costs_no_more_than_itself(tmp_path, caplog, has_copies, left):
    write_state(str(tmp_path), {"count": 3})
    [path] = tmp_path.iterdir()
    assert read_state(str(tmp_path), has_copies) == {"count": 3}
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    assert read_state(str(tmp_path), has_copies) is None
    assert ("training goes on without" in caplog.text) == (has_copies or left is not None)
    assert ("copies of the peers" in caplog.text) == has_copies


class Untaught(Trainer):
    """A loss of its own, which is 0, so that nothing but the teacher's term is learned."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.logits.sum() * 0, outputs


class TaughtOnly(CodistillMixin, Untaught):
    pass


@pytest.mark.parametrize(("accepts", "is_scaled"), [(True, None), (True, False), (False, None), (False, True)])
def test_the_term_of_several_micro_batches_is_that_of_one_whatever_the_trainer_divides(tmp_path, accepts, is_scaled):
    trainer_of(tmp_path).model.save_pretrained(tmp_path / "teacher")

    def taught(**settings):
        options = CodistillArguments(codistill_teacher=str(tmp_path / "teacher"))
        settings |= {"max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0, "kind": TaughtOnly}
        trainer = trainer_of(tmp_path, codistill=options, **settings)
        trainer.model_accepts_loss_kwargs, trainer.loss_is_scaled_for_ga = accepts, is_scaled
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
        return torch.cat([(a - b).flatten() for a, b in zip(trainer.model.parameters(), before, strict=True)])

    whole = taught(per_device_train_batch_size=8)
    assert whole.abs().max() > 1e-3
    in_four = taught(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(in_four, whole, rtol=1e-4, atol=1e-5)


def test_the_epoch_counts_the_data_where_updates_were_left_out(tmp_path):
    """And losses are means over the updates that were made: with a rate of 0 those of a training that made all."""

    def trained(skipped):
        settings = {"per_device_train_batch_size": 2, "logging_steps": 1, "max_steps": 7, "learning_rate": 0.0}
        trainer = trainer_of(tmp_path, **settings)
        trainer._num_to_skip = lambda: skipped * int(trainer.state.global_step == 1)
        return trainer.train().training_loss, {log["step"]: log for log in trainer.state.log_history if "loss" in log}

    mean, logs = trained(skipped=2)
    assert {step: log["epoch"] for step, log in logs.items()} == {step: step / 5 for step in (1, 4, 5, 6, 7)}
    _, all_logs = trained(skipped=0)
    losses = {step: log["loss"] for step, log in logs.items()}
    assert losses == pytest.approx({step: all_logs[step]["loss"] for step in losses}, rel=1e-4)
    assert mean == pytest.approx(sum(losses.values()) / 5, rel=1e-4)
