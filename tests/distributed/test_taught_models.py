"""Teachers that never change, in real processes of fairseq and vision: the term, what is kept, resume, refusals."""

import json
import shutil

import pytest
import torch
from helpers import (
    USER_DIR,
    codistill_command,
    free_ports,
    json_logs,
    load_checkpoint,
    make_toy_data,
    recorded_command,
    run_together,
    train_command,
)
from test_reference import SETTINGS, parameters, reference
from vision_helpers import codistill_commands, records, vision_command

LARGER = ["--encoder-ffn-embed-dim", "64", "--decoder-layers", "2"]


@pytest.fixture(scope="module")
def teacher(toy_data, tmp_path_factory):
    """The checkpoint of a larger model, which plain fairseq trained a little."""
    folder = tmp_path_factory.mktemp("teacher")
    command = train_command(
        toy_data, folder, *LARGER, "--max-update", "5", "--criterion", "cross_entropy", "--disable-validation"
    )
    (result,) = run_together([command], 120)
    assert result.returncode == 0, result.output
    return str(folder / "checkpoint_last.pt")


def read(file):
    """As fairseq itself reads it."""
    from fairseq import checkpoint_utils

    load_checkpoint(file)  # the workaround of torch's check
    (model,), _ = checkpoint_utils.load_model_ensemble([file])
    return model.eval()


def one_model(data, folder, *extra):
    return codistill_command(data, folder, 0, "", "--codistill-num-models", "1", *extra)


@pytest.mark.parametrize("num_models", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_fairseq_follows_algorithm_1_with_teachers(toy_data, teacher, tmp_path, num_models):
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models)) if num_models > 1 else ""
    other = tmp_path / "other.pt"
    shutil.copy(teacher, other)
    commands = [
        recorded_command(
            codistill_command(
                toy_data, tmp_path / str(i), i, addresses, "--codistill-num-models", str(num_models),
                "--seed", str(i + 1), "--codistill-data-seed", "7" if num_models > 1 else "1",
                "--codistill-codec", "fp32", "--codistill-weight", "3", "--codistill-interval", "2",
                "--codistill-teacher", f"{teacher}:0.5", "--codistill-teacher", str(other), *SETTINGS,
            ),
            tmp_path / f"losses{i}.json",
        )
        for i in range(num_models)
    ]  # fmt: skip
    results = run_together(commands, timeout_s=200)
    for result in results:
        assert result.returncode == 0, result.output
    frozen = read(teacher)
    taught_by = [(frozen, 0.5), (frozen, 1.0)]
    seed = 7 if num_models > 1 else 1
    losses, expected = reference(toy_data, tmp_path, num_models, 3.0, 2, "predictions", taught_by, seed)
    for i in range(num_models):
        assert json.loads((tmp_path / f"losses{i}.json").read_text()) == pytest.approx(losses[i], abs=1e-5)
        for name, value in parameters(tmp_path / str(i)).items():
            torch.testing.assert_close(value, expected[i][name], atol=1e-5, rtol=0, msg=name)
        assert all(log["codistill_teacher_loss"] > 0 for log in json_logs(results[i].output, "train_inner"))


def test_fairseq_keeps_what_a_teacher_predicts_and_goes_on_bit_for_bit(toy_data, teacher, tmp_path):
    def train(name, until, cache):
        extra = [
            "--dropout", "0.1", "--max-update", str(until), "--disable-validation", "--codistill-teacher", teacher,
            "--codistill-teacher-cache", str(tmp_path / cache), "--codistill-divergence", "kl",
            "--codistill-teacher-codec", "tokens:4",
        ]  # fmt: skip
        (result,) = run_together([one_model(toy_data, tmp_path / name, *extra)], 120)
        assert result.returncode == 0, result.output
        return result.output

    train("straight", 30, "one")
    train("stopped", 18, "two")
    train("stopped", 30, "two")
    again = train("again", 30, "one")  # reads everything, and never loads the teacher
    assert "on cpu" not in again
    size = {name: sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("one", "two")}
    assert size["one"] == size["two"] > 0
    expected = parameters(tmp_path / "straight")
    for name in ("stopped", "again"):
        found = parameters(tmp_path / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_what_cannot_teach_is_one_line_before_training(toy_data, teacher, tmp_path):
    other = make_toy_data(tmp_path / "other", extra_words=["more"])
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    cases = {
        "nowhere.pt": (toy_data, "which is not there"),
        str(broken): (toy_data, "which is no checkpoint of fairseq"),
        teacher: (other, "which was trained with another source dictionary"),
        f"{teacher}:-1": (toy_data, "the weight must be a finite number above 0"),
    }
    commands = [
        one_model(data, tmp_path / str(number), "--codistill-teacher", file)
        for number, (file, (data, _)) in enumerate(cases.items())
    ]
    for result, (_, message) in zip(run_together(commands, 120), cases.values(), strict=True):
        assert result.returncode == 2, result.output
        lines = [line for line in result.output.splitlines() if "error: " in line]
        assert message in lines[-1]
        assert "Traceback" not in result.output
        assert not json_logs(result.output, "train_inner")


def test_a_codistilled_checkpoint_teaches_and_the_student_is_an_ordinary_checkpoint(toy_data, teacher, tmp_path):
    student = one_model(toy_data, tmp_path / "a", "--codistill-teacher", teacher, "--max-update", "3")
    (result,) = run_together([student], 120)
    assert result.returncode == 0, result.output
    file = str(tmp_path / "a" / "checkpoint_last.pt")
    settings = load_checkpoint(tmp_path / "a" / "checkpoint_last.pt")["cfg"]
    assert (settings["task"]["_name"], settings["criterion"]["_name"]) == (
        "translation",
        "label_smoothed_cross_entropy",
    )
    next_one = one_model(toy_data, tmp_path / "b", "--codistill-teacher", file, "--max-update", "2")
    assert USER_DIR in next_one
    (result,) = run_together([next_one], 120)
    assert result.returncode == 0, result.output


VISION = "--max-updates 8 --batch-size 16 --lr 0.05 --lr-batch-size 0 --augmentation crop".split()


@pytest.fixture(scope="module")
def image_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_teacher")
    (result,) = run_together([vision_command(folder, *VISION, "--model", "wrn10_2", "--seed", "9")], 120)
    assert result.returncode == 0, result.output
    return str(folder / "checkpoint_last.pt")


def test_an_image_teacher_of_another_architecture_teaches_alone_and_beside_peers(image_teacher, tmp_path):
    teach = ["--codistill-teacher", f"{image_teacher}:2", "--codistill-interval", "3"]
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    commands = [
        vision_command(tmp_path / "alone", *VISION, *teach),
        *codistill_commands(tmp_path, addresses, *VISION, *teach),
    ]
    for result in run_together(commands, timeout_s=150):
        assert result.returncode == 0, result.output
    for name in ("alone", "0", "1"):
        for record in records(tmp_path / name, "train"):
            assert record["codistill_teacher_loss"] > 0
            together = record["nll_loss"] + record["codistill_loss"] + record["codistill_teacher_loss"]
            assert record["loss"] == pytest.approx(together, abs=1e-5)
    assert [record["codistill_peers"] for record in records(tmp_path / "0", "train")] == [1, 0, 0, 1, 0, 0, 1, 0]


def test_image_students_with_kept_predictions_go_on_bit_for_bit_and_others_read_them(image_teacher, tmp_path):
    def train(name, updates):
        extra = ["--codistill-teacher", image_teacher, "--codistill-teacher-cache", str(tmp_path / "cache")]
        (result,) = run_together([vision_command(tmp_path / name, *VISION, *extra, "--max-updates", updates)], 120)
        assert result.returncode == 0, result.output
        return result.output

    assert "teacher" in train("straight", "8")
    train("part", "5")
    output = train("part", "8")
    assert f"teacher {image_teacher}" not in output  # it need not even be read
    expected, found = (torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("straight", "part"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_timm_weights_teach_and_what_does_not_fit_is_one_line(image_teacher, tmp_path):
    import timm

    torch.manual_seed(0)
    weights = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), weights)
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), other)
    named = ["--teacher-model", "resnet10t", "--image-size", "32", "--max-updates", "2", "--batch-size", "16"]
    cases = [
        (["--codistill-teacher", str(weights), *named], 0, ""),
        (["--codistill-teacher", str(other), *named], 2, "must know the 10 classes"),
        (["--codistill-teacher", str(weights)], 2, "which is of another model than --teacher-model"),
        (["--codistill-teacher", image_teacher, *named], 2, "leave the option out"),
    ]
    commands = [vision_command(tmp_path / str(i), *case[0]) for i, case in enumerate(cases)]
    for result, (_, code, message) in zip(run_together(commands, 150), cases, strict=True):
        assert result.returncode == code, result.output
        assert message in result.output
        assert "Traceback" not in result.output
