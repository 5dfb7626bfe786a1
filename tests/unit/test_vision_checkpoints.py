"""What stands under a final name is whole, finite, and loads again, that of an earlier version too."""

import dataclasses
import os

import pytest
import safetensors.torch
import timm
import torch
from fairseq_codistill.vision import checkpoints
from fairseq_codistill.vision.checkpoints import (
    BEST,
    LAST,
    WEIGHTS,
    Checkpoint,
    check_options,
    load,
    prepare,
    save,
    save_weights,
    write_missing_weights,
)  # fmt: skip
from fairseq_codistill.vision.config import VisionConfig

from fairseq_codistill.config import ConfigError
from fairseq_codistill.whole_files import SaveError


def make_checkpoint(elapsed=3, size=10, **options):
    stored = {**dataclasses.asdict(VisionConfig()), "devices_per_model": 1, "num_images": 100, **options}
    return Checkpoint({"weight": torch.zeros(size)}, {}, {}, elapsed, {}, 50.0, stored)


def test_what_is_saved_is_loaded(tmp_path):
    assert load(tmp_path) is None
    save(tmp_path, LAST, make_checkpoint())
    assert load(tmp_path).elapsed == 3
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


@pytest.mark.parametrize("change", [{"first_group": "other.pt"}, {"freeze_first_group": True}])
def test_a_training_with_another_start_of_the_first_group_does_not_go_on(tmp_path, change):
    checkpoint = make_checkpoint()
    with pytest.raises(ConfigError, match=r"-first-group is .*(begun|trained) with"):
        check_options(checkpoint, {**checkpoint.options, **change}, tmp_path)
    begun = make_checkpoint(first_group="a/moved.pt")
    check_options(begun, {**begun.options, "first_group": "b/moved.pt"}, tmp_path)


def test_a_checkpoint_from_before_an_option_or_a_field_came_is_taken(tmp_path):
    save(tmp_path, LAST, make_checkpoint())
    stored = torch.load(tmp_path / LAST, weights_only=True)
    assert "ema" not in stored  # nor has one without a moving average
    for name in ("update_freq", "ema_decay", "mixup", "skip_broken", "num_images"):
        del stored["options"][name]
    torch.save(stored, tmp_path / LAST)
    old = load(tmp_path)
    assert old.ema == {}
    options = make_checkpoint().options
    check_options(old, options, tmp_path)
    with pytest.raises(ConfigError, match="--update-freq is 2, but .* was trained with 1"):
        check_options(old, {**options, "update_freq": 2}, tmp_path)


def tiny_resnet(**settings):
    return timm.create_model("resnet10t", num_classes=3, **settings)


@pytest.mark.parametrize("has_average", [False, True])
def test_timm_loads_a_checkpoint_and_its_weights_as_safetensors(tmp_path, has_average):
    trained, average = tiny_resnet(), tiny_resnet()
    checkpoint = make_checkpoint(model="resnet10t")
    checkpoint.model, checkpoint.ema = trained.state_dict(), average.state_dict() if has_average else {}
    save(tmp_path, BEST, checkpoint)
    save_weights(tmp_path, checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, WEIGHTS]
    evaluated = (average if has_average else trained).state_dict()
    for name in (BEST, WEIGHTS):
        loaded = tiny_resnet(checkpoint_path=str(tmp_path / name)).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in evaluated.items())
    assert load_both(tmp_path, checkpoint)


def load_both(folder, checkpoint):
    """Whether training goes on with both, also from a file of before, in which the average had another name."""
    save(folder, LAST, checkpoint)
    stored = torch.load(folder / LAST, weights_only=True)
    found = [load(folder)]
    stored["ema"] = stored.pop("model_ema", {})
    torch.save(stored, folder / LAST)
    found.append(load(folder))
    return all(
        each.ema.keys() == checkpoint.ema.keys() and torch.equal(each.model["fc.weight"], checkpoint.model["fc.weight"])
        for each in found
    )


def test_training_does_not_go_on_with_more_or_fewer_images(tmp_path):
    with pytest.raises(ConfigError, match="--dataset has 99 images to train on, but .* was trained on 100"):
        check_options(make_checkpoint(), make_checkpoint(num_images=99).options, tmp_path)


def test_skip_broken_may_be_set_later_where_it_leaves_the_training_images_as_they_were(tmp_path):
    begun = make_checkpoint()
    check_options(begun, {**begun.options, "skip_broken": True}, tmp_path)
    with pytest.raises(ConfigError, match="mend or replace a broken image, rather than leave it out"):
        check_options(begun, {**begun.options, "skip_broken": True, "num_images": 99}, tmp_path)


def test_a_training_does_not_go_on_with_another_split_of_the_view(tmp_path):
    begun = make_checkpoint(view="model", codistill_model_index=1)
    check_options(begun, {**begun.options, "view": "1", "codistill_model_index": 0}, tmp_path)  # alone
    with pytest.raises(
        ConfigError, match=r"--view is 'model', split 0 of 8 for model 0, .* split 1 of 8; give --view 1"
    ):
        check_options(begun, {**begun.options, "codistill_model_index": 0}, tmp_path)
    whole = make_checkpoint()
    check_options(whole, {**whole.options, "codistill_model_index": 1}, tmp_path)
    del whole.options["view"]  # of before there were views
    with pytest.raises(ConfigError, match="was trained with all channels; give --view ''"):
        check_options(whole, begun.options, tmp_path)


def test_a_moving_average_is_not_thrown_away_without_a_word(tmp_path):
    averaged = make_checkpoint(ema_decay=0.9)
    averaged.ema = {"weight": torch.zeros(10)}
    check_options(averaged, {**averaged.options, "ema_decay": 0.99}, tmp_path)
    with pytest.raises(ConfigError, match=r"--ema-decay is 0.0, but .* holds a moving average.*give --ema-decay 0.9 "):
        check_options(averaged, make_checkpoint().options, tmp_path)
    plain = make_checkpoint()
    check_options(plain, {**plain.options, "ema_decay": 0.9}, tmp_path)  # it begins here


def test_training_goes_on_from_weights_only_if_it_was_begun_from_such(tmp_path):
    alone, tuned = make_checkpoint(), make_checkpoint(initial_checkpoint="a/moved.pth")
    for same in ({"initial_checkpoint": "b/moved.pth"}, {"initial_checkpoint": "", "pretrained": True}):
        check_options(tuned, {**tuned.options, **same}, tmp_path)
    with pytest.raises(ConfigError, match=r"starts from no weights, but .* begun from --initial-checkpoint a/moved"):
        check_options(tuned, alone.options, tmp_path)
    for now in (tuned.options, {**alone.options, "pretrained": True}):
        with pytest.raises(ConfigError, match=r"starts from --(initial|pretrained).*, but .* was begun from none"):
            check_options(alone, now, tmp_path)
    for name in ("initial_checkpoint", "pretrained"):
        del alone.options[name]
    check_options(alone, tuned.options, tmp_path)  # of before there were such options


def test_training_does_not_go_on_with_other_pixels(tmp_path):
    pixels = {"--image-size": 32, "--augmentation": "cifar", "--mixup": 0.0}
    begun = make_checkpoint(pixels=pixels)
    check_options(begun, begun.options, tmp_path)
    for flag, value in (("--image-size", 64), ("--augmentation", "none"), ("--mixup", 0.2)):
        now = {**begun.options, "pixels": {**pixels, flag: value, "--came-later": 1}}
        with pytest.raises(ConfigError, match=f"{flag} is {value!r}, but .* was trained with {pixels[flag]!r}; give"):
            check_options(begun, now, tmp_path)
        check_options(make_checkpoint(), now, tmp_path)  # of before they were kept


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half of one"])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path / LAST)) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_an_error_while_writing_leaves_the_last_whole_one_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path, LAST, make_checkpoint(elapsed=3))

    def half(content, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed\nframe #0: ...")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SaveError, match="the one before it is still there") as error:
        save(tmp_path, LAST, make_checkpoint(elapsed=4))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert load(tmp_path).elapsed == 3


def test_half_files_of_a_killed_run_are_removed_at_the_next_start(tmp_path):
    (tmp_path / (LAST + ".tmp")).write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"somebody else's")
    prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(ConfigError, match=f"--save-dir is '{folder}', which cannot be written to: "):
            prepare(folder)


@pytest.mark.parametrize("kind", [UnicodeDecodeError, IndexError, KeyError, TypeError])
def test_whatever_a_damaged_checkpoint_raises_is_one_line(tmp_path, monkeypatch, kind):
    def damaged(*_, **__):
        raise kind("utf-8", b"x", 0, 1, "damaged") if kind is UnicodeDecodeError else kind("damaged")

    save(tmp_path, LAST, make_checkpoint())
    monkeypatch.setattr(torch, "load", damaged)
    with pytest.raises(ConfigError, match=f"{LAST} cannot be read: .*damaged.*; remove it"):
        load(tmp_path)


def test_weights_that_are_missing_or_older_than_the_best_checkpoint_are_written(tmp_path, caplog):
    write_missing_weights(tmp_path)
    assert not list(tmp_path.iterdir())
    save(tmp_path, BEST, make_checkpoint(size=3))
    write_missing_weights(tmp_path)
    assert safetensors.torch.load_file(tmp_path / WEIGHTS)["weight"].shape == (3,)
    save(tmp_path, BEST, make_checkpoint(size=4))
    os.utime(tmp_path / WEIGHTS, ns=(0, 0))
    write_missing_weights(tmp_path)
    assert safetensors.torch.load_file(tmp_path / WEIGHTS)["weight"].shape == (4,)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / BEST).write_bytes(b"no checkpoint")
    write_missing_weights(tmp_path)
    assert "is not written" in caplog.text


def test_weights_of_another_update_than_the_best_checkpoint_are_written_anew_whatever_the_clock_says(tmp_path):
    save(tmp_path, BEST, make_checkpoint(elapsed=3, size=3))
    write_missing_weights(tmp_path)
    save(tmp_path, BEST, make_checkpoint(elapsed=9, size=9))
    os.utime(tmp_path / BEST, ns=(0, 0))  # of a copy, or a clock that was put back
    write_missing_weights(tmp_path)
    assert safetensors.torch.load_file(tmp_path / WEIGHTS)["weight"].shape == (9,)
    before = (tmp_path / WEIGHTS).stat().st_ino
    write_missing_weights(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_ino == before


def test_what_a_training_goes_on_with_otherwise_is_told_and_what_changes_nothing_is_not(tmp_path, caplog):
    begun = make_checkpoint(label_smoothing=0.1)
    del begun.options["ema_warmup"]  # as if it had come later
    now = {**begun.options, "lr": 0.5, "lr_schedule": "cosine", "label_smoothing": 0.0, "ema_warmup": True}
    now |= {"max_updates": 7, "compile": True, "save_updates": 3}
    checkpoints.tell_changes(begun, now, tmp_path)
    told = [record.getMessage().partition(f"{LAST}: ")[2] for record in caplog.records]
    assert told == [
        "--lr was 0.1 and is 0.5",
        "--lr-schedule was 'step' and is 'cosine'",
        "--label-smoothing was 0.1 and is 0.0",
    ]


def test_a_log_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ConfigError, match="log.jsonl cannot be written to: "):
        prepare(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_that_is_not_finite_is_found(value):
    model = torch.nn.Linear(1000, 1)
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("limit", torch.tensor([-torch.inf, 1.0]))  # as some models clamp by
    finite, state = checkpoints.Finite(model), model.state_dict()
    assert finite.holds(state)
    state["weight"][0, 500] = value
    assert not finite.holds(state)
    assert finite.holds({})


def test_a_buffer_that_was_infinite_at_the_start_may_be_so_but_not_nan_and_one_that_was_nan_may_be_anything():
    model = torch.nn.Linear(2, 1)
    model.register_buffer("limit", torch.tensor([-torch.inf, 1.0]))
    model.register_buffer("unset", torch.tensor(torch.nan))
    finite, state = checkpoints.Finite(model), model.state_dict()
    assert finite.holds(state)
    state["limit"][0] = torch.nan
    assert not finite.holds(state)


def test_a_folder_of_images_may_be_moved_and_its_kind_may_not_change(tmp_path):
    begun = make_checkpoint(dataset="imagefolder:im/", transfer_dataset="imagefolder:a")
    moved = {**begun.options, "dataset": "imagefolder:/scratch/im", "transfer_dataset": "imagefolder:b"}
    check_options(begun, moved, tmp_path)
    with pytest.raises(ConfigError, match="--dataset is 'digits', but .* was trained with 'imagefolder:im/'"):
        check_options(begun, {**begun.options, "dataset": "digits"}, tmp_path)


def test_a_training_does_not_go_on_as_another_network(tmp_path):
    begun = make_checkpoint(model_kwargs=["output_stride=8", "drop_path_rate=0.1"])
    check_options(begun, {**begun.options, "model_kwargs": ["output_stride=8"]}, tmp_path)
    with pytest.raises(ConfigError, match="--model-kwargs is .*output_stride=16.*was trained with"):
        check_options(begun, {**begun.options, "model_kwargs": ["output_stride=16"]}, tmp_path)


def test_a_state_of_another_shape_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"the model does not fit .*checkpoint_last.pt .*size mismatch for weight"):
        checkpoints.load_into(torch.nn.Linear(3, 2), torch.nn.Linear(3, 4).state_dict(), tmp_path)


def test_copies_of_the_peers_of_another_number_of_models_are_refused(tmp_path):
    stored = make_checkpoint(codistill_num_models=2)
    now = make_checkpoint(codistill_num_models=3).options
    check_options(stored, now, tmp_path)  # predictions leave nothing behind
    stored.replicas = {"validation": 2.0}
    check_options(stored, now, tmp_path)  # nor does what they weigh by
    stored.replicas = {"elapsed": {"1": 20}, "copies": {"1": {"weight": torch.zeros(1)}}}
    with pytest.raises(ConfigError, match="--codistill-num-models is 3, but .* of a run of 2 models"):
        check_options(stored, now, tmp_path)
