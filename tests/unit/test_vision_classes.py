"""What the classes are called: kept, logged, and compared by whoever cannot see it from the batches."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from fairseq_codistill.vision.checkpoints import check_options
from fairseq_codistill.vision.datasets import load_images
from fairseq_codistill.vision.distributed import Place
from fairseq_codistill.vision.exchange import PeerExchange, told_of
from fairseq_codistill.vision.options import parse_options
from fairseq_codistill.vision.train import main as codistill_vision
from PIL import Image

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.introductions import Identity, Introduction
from fairseq_codistill.coordinator.wire import MAX_JSON_BYTES
from fairseq_codistill.sampling import Timetable

PLACE = Place(0, 1, torch.device("cpu"))
OWN = "--codistill-exchange checkpoints --codistill-own-data"


def make_folder(folder, *classes):
    for split in ("train", "val"):
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / split / label / "1.png")
    return f"imagefolder:{folder}"


def compared(dataset, flags, monkeypatch):
    """What is compared when the models meet, and what must be equal of the batches."""
    told = []
    models = "--codistill-num-models 2 --codistill-addresses 127.0.0.1:1,127.0.0.1:2".split()
    config = parse_options(["--no-save", "--dataset", dataset, "--image-size", "8", *models, *flags.split()])
    one = PeerExchange(config, PLACE, Timetable(64, 1, 32, 1, 1))
    monkeypatch.setattr(one.peers, "meet", lambda *_, settings, **__: told.append(settings))
    one.meet(load_images(config), torch.nn.Linear(2, 2), 0, 4)
    return told[0]


@pytest.mark.parametrize("flags", [OWN, "--transfer-dataset digits"])
def test_models_with_data_of_their_own_tell_each_other_what_their_classes_are_called(tmp_path, flags, monkeypatch):
    animals, vehicles = make_folder(tmp_path / "a", "cat", "dog"), make_folder(tmp_path / "b", "bus", "car")
    mine, theirs = (compared(dataset, flags, monkeypatch) for dataset in (animals, vehicles))
    assert {name for name in mine if mine[name] != theirs[name]} == {"names of the classes"}
    assert compared(animals, flags, monkeypatch) == mine
    assert "names of the classes" not in compared(animals, "", monkeypatch)  # batches with their targets are compared


def introduction(index, names):
    config = CodistillationConfig(codistill_num_models=2, codistill_model_index=index)
    return Introduction(config, Identity({"names of the classes": names}, {}, str(index), index), 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], "names of the classes: ['cat', 'dog'] here, ['dog', 'cat'] on model 1"),
        ([f"class{i}" for i in range(999)], "names of the classes, number 0: 'class0' here, 'class998' on model 1"),
    ],
)
def test_the_first_name_that_differs_is_named_and_not_a_thousand(names, message):
    peer = SimpleNamespace(model=1, hello=introduction(1, names[::-1]).hello)
    assert introduction(0, names).why_unfit(peer).endswith(f"make equal: {message}")
    more = SimpleNamespace(model=1, hello=introduction(1, [*names, *"abcdefgh"]).hello)
    assert f"number {len(names)}: None here, 'a' on model 1" in introduction(0, names).why_unfit(more)
    assert introduction(0, names).why_unfit(SimpleNamespace(model=1, hello=introduction(1, names).hello)) is None


def test_names_of_very_many_classes_fit_into_what_models_say_when_they_meet():
    names = [f"n{i:08d} and what it is called" for i in range(21_843)]
    others = [*names[:20_000], "another", *names[20_001:]]
    mine, theirs = introduction(0, told_of(names)), introduction(1, told_of(others))
    assert len(json.dumps(mine.hello)) < MAX_JSON_BYTES / 2
    why = mine.why_unfit(SimpleNamespace(model=1, hello=theirs.hello))
    assert "names of the classes, number 232: 'digest " in why
    assert " of classes 19952 to 20037' on model 1" in why


def test_data_without_names_have_their_numbers():
    config = parse_options("--no-save --dataset fake --fake-classes 3 --fake-images 8".split())
    assert load_images(config).classes == ("0", "1", "2")
    assert len(load_images(parse_options(["--no-save"])).classes) == 10


def train(folder, dataset, *flags):
    fixed = "--cpu --model wrn10_1 --num-workers 0 --batch-size 2 --max-updates 1 --image-size 8 --no-progress-bar"
    return codistill_vision([*fixed.split(), "--save-dir", str(folder), "--dataset", dataset, *flags])


@pytest.fixture
def handlers():
    """Those of the process come back: the command has its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def log_of(folder, kind):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_training_does_not_go_on_with_renamed_classes_and_a_finished_one_gets_its_safetensors(
    tmp_path, capsys, handlers
):
    dataset = make_folder(tmp_path / "images", "cat", "dog")
    assert train(tmp_path, dataset) == 0
    assert log_of(tmp_path, "start")[0]["class_names"] == ["cat", "dog"]
    assert not (tmp_path / "checkpoint_best.safetensors").exists()
    assert train(tmp_path, dataset, "--safetensors") == 0
    assert (tmp_path / "checkpoint_best.safetensors").exists()
    for split in ("train", "val"):
        (tmp_path / "images" / split / "dog").rename(tmp_path / "images" / split / "elk")
    assert train(tmp_path, dataset) == 2
    assert "class 1 of --dataset is 'elk', but" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_what_its_classes_are_called_is_taken(tmp_path):
    now = vars(parse_options(["--no-save"])) | {"devices_per_model": 1, "num_images": 9, "class_names": ["a", "b"]}
    told = SimpleNamespace(options=dict(now), ema={}, replicas={})
    check_options(told, now, tmp_path)
    with pytest.raises(ConfigError, match="class 1 of --dataset is 'c', but .* trained with 'b' in its place"):
        check_options(told, {**now, "class_names": ["a", "c"]}, tmp_path)
    del told.options["class_names"]
    check_options(told, now, tmp_path)


def test_a_signal_while_the_models_meet_is_the_end_of_the_log(tmp_path, monkeypatch, handlers):
    told = []
    monkeypatch.setattr(PeerExchange, "meet", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("fairseq_codistill.codistiller.Codistiller.close", lambda self, reason: told.append(reason))
    with pytest.raises(SystemExit) as error:
        train(tmp_path, "digits")
    assert error.value.code == 128 + signal.SIGTERM
    assert [line["reason"] for line in log_of(tmp_path, "end")] == told == ["SIGTERM"]
