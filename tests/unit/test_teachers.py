"""Teachers that never change: what they add, what is kept of them, and what is refused."""

import os
from collections import UserDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fairseq_codistill import Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.keys import sample_marks
from fairseq_codistill.figures import _warn_of_nothing_learned
from fairseq_codistill.sources import split_teachers
from fairseq_codistill.teacher_cache import TeacherCache
from fairseq_codistill.teachers import Placed, Teachers

CLASSES, FEATURES = 6, 4


class Counting(nn.Linear):
    """Counts how often it is asked."""

    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs)


def make(seed):
    torch.manual_seed(seed)
    return Counting(FEATURES, CLASSES)


def data(seed=0, batch=5):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, FEATURES, generator=generator)
    return inputs, torch.randint(CLASSES, (batch,), generator=generator), torch.arange(batch)


def taught(model, teachers, batch, **settings):
    """The loss of one batch, and the figures."""
    inputs, targets, ids = batch
    with Codistiller(num_models=1, teachers=teachers, **settings) as peers:
        peers.meet(model, 10, fixed_inputs=True)
        loss = peers.loss(model(inputs), targets, ids, forward=lambda copy: copy(inputs))
        loss.backward()
        return loss.detach(), peers.figures()


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_the_term_of_a_teacher_is_its_weight_times_the_divergence(divergence):
    model, teacher, batch = make(1), make(2), data()
    loss, figures = taught(model, [(teacher, 0.5)], batch, divergence=divergence)
    mine, theirs = model(batch[0]), teacher(batch[0]).detach()
    if divergence == "mse":
        expected = (mine - theirs).square().mean(1).mean()
    else:
        expected = nn.functional.kl_div(mine.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="none")
        expected = expected.sum(1).mean()
    supervised = nn.functional.cross_entropy(mine, batch[1])
    torch.testing.assert_close(loss, (supervised + 0.5 * expected).detach())
    assert figures["codistill_teacher_loss"] == pytest.approx(0.5 * float(expected.detach()), rel=1e-5)
    assert figures["codistill_peers"] == 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_a_model_that_teaches_itself_changes_nothing():
    model, twin, batch = make(1), make(1), data()
    loss, figures = taught(model, [twin], batch)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(batch[0]), batch[1]).detach())
    assert figures["codistill_teacher_loss"] == 0


def test_a_teacher_leaves_the_random_numbers_of_the_model_alone():
    class Noisy(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) + torch.rand(())

    model, teacher = make(1), Noisy(FEATURES, CLASSES)
    before = torch.get_rng_state()
    taught(model, [teacher], data())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_placed_teacher_is_asked_for_everything_else_as_if_it_were_not():
    class Named(nn.Linear):
        word = "here"

    placed = Placed(Named(FEATURES, CLASSES), torch.device("cpu"))
    assert placed.word == "here"
    assert placed.out_features == CLASSES
    assert placed(torch.zeros(1, FEATURES)).shape == (1, CLASSES)
    with pytest.raises(AttributeError):
        _ = placed.nothing


def test_inputs_of_a_teacher_elsewhere_are_moved_in_whatever_they_are_held():
    class Held(NamedTuple):
        inner: Any

    class Asked(nn.Module):
        def forward(self, inputs):
            return inputs["x"].inner[0]

    placed = Placed(Asked(), torch.device("meta"))
    assert placed(UserDict(x=Held([torch.zeros(2)]))).device.type == "meta"


def test_what_is_kept_is_read_and_the_teacher_is_not_asked_again(tmp_path):
    settings = {"teacher_cache": str(tmp_path), "teacher_codec": f"topk:{CLASSES}", "divergence": "kl"}
    teacher, batch = make(2), data()
    first, _ = taught(make(1), [teacher], batch, **settings)
    plain, _ = taught(make(1), [teacher], batch, divergence="kl")
    torch.testing.assert_close(first, plain, atol=2e-3, rtol=0)  # logits are kept in fp16
    asked = teacher.calls
    again, _ = taught(make(1), [teacher], batch, **settings)
    assert teacher.calls == asked
    assert torch.equal(first, again)
    inputs, targets, ids = batch  # found by the sample, in whatever batch it comes
    order = torch.tensor([3, 0, 4])
    taught(make(1), [teacher], (inputs[order], targets[order], ids[order]), **settings)
    assert teacher.calls == asked


def test_tokens_are_kept_too_and_drawn_alike_by_every_process(tmp_path):
    settings = {"teacher_codec": "tokens:4", "divergence": "kl"}
    losses = [
        taught(make(1), [make(2)], data(), teacher_cache=str(tmp_path / name), **settings)[0] for name in ("a", "b")
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": 3}, "teachers: "),
        ({"teacher_codec": "topk:3"}, "codec: 'topk:2' there, 'topk:3' here"),
        ({"about": {"classes": 7}}, "data: "),
    ],
)
def test_a_cache_of_something_else_is_refused_before_training(tmp_path, change, message):
    def begin(teacher=2, teacher_codec="topk:2", about=None):
        with Codistiller(
            num_models=1, teachers=[make(teacher)], teacher_cache=str(tmp_path), teacher_codec=teacher_codec
        ) as peers:
            peers.meet(make(1), 10, settings=about or {"classes": 6}, fixed_inputs=True)

    begin()
    begin()
    with pytest.raises(ConfigError, match=f"teacher_cache is .* does not belong to this run .*{message}"):
        begin(**change)


def test_a_sample_that_has_changed_is_refused(tmp_path):
    settings = {"teacher_cache": str(tmp_path), "teacher_codec": "topk:2"}
    inputs, targets, ids = data()
    taught(make(1), [make(2)], (inputs, targets, ids), **settings)
    with pytest.raises(ConfigError, match="sample 0 was another one"):
        taught(make(1), [make(2)], (inputs, (targets + 1) % CLASSES, ids), **settings)


def test_a_record_that_a_killed_process_left_half_written_is_dropped(tmp_path):
    marks = sample_marks(torch.arange(3), torch.arange(3), [1, 1, 1])
    cache = TeacherCache(str(tmp_path), "topk:2", ["aa"], {})
    logits = torch.randn(3, CLASSES)
    cache.add(marks, [logits])
    (shard,) = tmp_path.glob("*.rows")
    cache._own.close()
    shard.write_bytes(shard.read_bytes()[:-1])
    again = TeacherCache(str(tmp_path), "topk:2", ["aa"], {})
    assert len(again) == 2
    assert again.read(marks, CLASSES, torch.device("cpu")) is None
    again.add(marks, [logits])
    (found,) = again.read(marks, CLASSES, torch.device("cpu"))
    assert torch.equal(found.classes, logits.topk(2).indices)


def test_two_processes_write_beside_each_other_and_read_both(tmp_path):
    marks = [sample_marks(torch.tensor([i]), torch.tensor([i]), [1]) for i in range(2)]
    caches = [TeacherCache(str(tmp_path), "topk:2", ["aa"], {}) for _ in range(2)]
    for cache, mark in zip(caches, marks, strict=True):
        cache.add(mark, [torch.randn(1, CLASSES)])
    assert len(list(tmp_path.glob("*.rows"))) == 2
    late = TeacherCache(str(tmp_path), "topk:2", ["aa"], {})
    assert all(late.read(mark, CLASSES, torch.device("cpu")) is not None for mark in marks)


def test_the_zeros_that_a_power_cut_leaves_end_a_file(tmp_path):
    cache = TeacherCache(str(tmp_path), "topk:2", ["aa"], {})
    cache.add(sample_marks(torch.tensor([1]), torch.tensor([1]), [1]), [torch.randn(1, CLASSES)])
    cache._own.close()
    (shard,) = tmp_path.glob("*.rows")
    shard.write_bytes(shard.read_bytes() + bytes(8192))
    again = TeacherCache(str(tmp_path), "topk:2", ["aa"], {})
    assert len(again) == 1
    assert again.read(sample_marks(torch.tensor([0]), torch.tensor([2]), [1]), CLASSES, torch.device("cpu")) is None


@pytest.mark.parametrize("is_hidden", [False, True])
def test_files_of_another_user_are_left_to_that_user(tmp_path, monkeypatch, caplog, is_hidden):
    marks = sample_marks(torch.tensor([1]), torch.tensor([1]), [1])
    TeacherCache(str(tmp_path), "topk:2", ["aa"], {}).add(marks, [torch.randn(1, CLASSES)])
    opened = Path.open

    def refused(path, mode="r", *args, **kwargs):  # permissions themselves would not keep root out
        if path.name == "0.rows" and (is_hidden or "a" in mode):
            raise PermissionError(13, "Permission denied")
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    cache = TeacherCache(str(tmp_path), "topk:2", ["aa"], {})
    assert Path(cache._own.name).name == "1.rows"
    assert len(cache) == 1 - is_hidden
    assert ("0.rows is another user's" in caplog.text) == is_hidden
    (tmp_path / "0.rows").unlink()
    with pytest.raises(ConfigError, match="cannot be used: Permission denied"):  # a folder that cannot be written to
        TeacherCache(str(tmp_path), "topk:2", ["aa"], {})


def test_processes_of_two_hosts_that_have_one_number_begin_a_folder_together(tmp_path, monkeypatch):
    replace = os.replace

    def replace_second(source, target):
        monkeypatch.setattr(os, "replace", replace)
        TeacherCache(str(tmp_path), "topk:2", ["aa"], {})  # the other one's
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_second)
    assert len(TeacherCache(str(tmp_path), "topk:2", ["aa"], {})) == 0
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "cache.json"


def test_a_teacher_in_a_folder_is_known_by_what_it_predicts_from(tmp_path):
    def digest():
        return Teachers(CodistillationConfig(codistill_teacher=str(tmp_path)))._digest(0)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = digest()
    (tmp_path / "README.md").write_text("what it is")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log.json").write_text("{}")
    for name in ("optimizer.pt", "rng_state_0.pth", "trainer_state.json"):
        (tmp_path / name).write_text("of the training")
    assert digest() == before
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert digest() != before


def test_a_damaged_cache_is_refused(tmp_path):
    marks = sample_marks(torch.arange(1), torch.arange(1), [1])
    cache = TeacherCache(str(tmp_path), "topk:2", ["aa"], {})
    cache.add(marks, [torch.randn(1, CLASSES)])
    (shard,) = tmp_path.glob("*.rows")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ConfigError, match="damaged"):
        cache.read(marks, CLASSES, torch.device("cpu"))
    (tmp_path / "cache.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        TeacherCache(str(tmp_path), "topk:2", ["aa"], {})


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (["big"], {}, "give a module"),
        ([(make(1), -1)], {}, "weight must be a finite number above 0"),
        ([], {"teacher": "nowhere.pt"}, "'nowhere.pt', which is not there"),
        ([], {"teacher": "a.pt:0"}, "weight must be"),
        ([], {"teacher": "a.pt,:0.5"}, "names no file before ':0.5'; give FILE:WEIGHT"),
        ([], {"teacher_cache": "x"}, "without a teacher"),
        ([make(1)], {"teacher_cache": "x", "teacher_codec": "fp16"}, "topk:K or tokens:K"),
        ([make(1)], {"teacher_cache": "x", "teacher_codec": "tokens:4"}, "use topk:K, or divergence kl"),
    ],
)
def test_a_teacher_that_cannot_work_is_refused(given, settings, message):
    with pytest.raises(ConfigError, match=message):
        Codistiller(num_models=1, teachers=given, **settings)


def test_a_teacher_of_other_classes_and_a_loop_without_forward_are_refused(tmp_path):
    model, (inputs, targets, ids) = make(1), data()
    with Codistiller(num_models=1, teachers=[nn.Linear(FEATURES, CLASSES + 1)]) as peers:
        peers.meet(model, 10)
        with pytest.raises(ConfigError, match="must know the same classes"):
            peers.loss(model(inputs), targets, ids, forward=lambda copy: copy(inputs))
    with Codistiller(num_models=1, teachers=[make(2)]) as peers:
        peers.meet(model, 10)
        with pytest.raises(ConfigError, match="forward=lambda teacher"):
            peers.loss(model(inputs), targets, ids)
    of_ours = nn.Sequential(nn.Linear(FEATURES, FEATURES), model)
    for teacher in (model, of_ours):  # whose layers would be trained no more
        with Codistiller(num_models=1, teachers=[teacher]) as peers, pytest.raises(ConfigError, match="give a copy"):
            peers.meet(model, 10)
    assert all(parameter.requires_grad for parameter in model.parameters())
    (tmp_path / "big.pt").touch()
    with (
        Codistiller(num_models=1, teacher=str(tmp_path / "big.pt")) as peers,
        pytest.raises(ConfigError, match="give modules"),
    ):
        peers.meet(model, 10)


def test_a_device_that_is_not_there_is_refused_before_training():
    peers = Codistiller(num_models=1, teachers=[make(2)], teacher_device="cuda:99")
    with pytest.raises(ConfigError, match="teacher_device is 'cuda:99'"):
        peers.meet(make(1), 10)


def test_several_teachers_are_read_from_one_option():
    assert split_teachers("a.pt, b.pt:2,C:/c.pt,d:0.5") == [("a.pt", 1.0), ("b.pt", 2.0), ("C:/c.pt", 1.0), ("d", 0.5)]
    assert CodistillationConfig(codistill_teacher="a.pt").is_taught


def test_a_transfer_set_that_is_named_where_names_mean_nothing_is_refused():
    config = CodistillationConfig(
        codistill_num_models=2, codistill_addresses="127.0.0.1:1,127.0.0.1:2", codistill_transfer="shared"
    )
    with pytest.raises(ConfigError, match="--codistill-transfer is 'shared', and this training loop has no data"):
        Codistiller(config).meet(make(1), 10)


def test_a_batch_without_samples_has_nothing_to_learn_from_teachers(tmp_path):
    model, teacher = make(1), make(2)
    empty = torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64), torch.arange(0)
    loss, _ = taught(model, [teacher], empty, divergence="kl", teacher_cache=str(tmp_path))
    assert float(loss) == 0.0
    assert teacher.calls == 0


@pytest.mark.parametrize("num_broken", [1, 5])
def test_what_a_teacher_predicts_that_is_not_finite_is_counted_and_told_where_that_is_all(caplog, num_broken):
    class Broken(Counting):
        def forward(self, inputs):
            found = super().forward(inputs).clone()
            found[:num_broken] = float("nan")
            return found

    torch.manual_seed(2)
    _warn_of_nothing_learned.cache_clear()
    loss, figures = taught(make(1), [Broken(FEATURES, CLASSES)], data(), divergence="kl")
    assert torch.isfinite(loss)
    assert figures["codistill_nonfinite"] == num_broken
    assert ("nothing was learned from the teachers" in caplog.text) == (num_broken == 5)
    assert "from the peers" not in caplog.text


def test_a_weight_of_a_teacher_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="weight 'heavy'; the weight must be a finite number"):
        Codistiller(num_models=1, teachers=[(make(2), "heavy")])


def test_a_cache_needs_inputs_that_are_the_same_in_every_pass(tmp_path):
    """Known by id and targets alone, another crop of an image would be given what was predicted of the first."""
    with (
        Codistiller(num_models=1, teachers=[make(2)], teacher_cache=str(tmp_path)) as peers,
        pytest.raises(ConfigError, match=r"teacher_cache is .* drawn anew in every pass .*fixed_inputs=True"),
    ):
        peers.meet(make(1), 10)
    assert not list(tmp_path.iterdir())
