"""Models by name, the multi-view cut, the frozen group, the optimizer's groups, the distance from the start."""

import pytest
import torch
from fairseq_codistill.vision.models import Distance, make_model, make_optimizer, refuse_size
from fairseq_codistill.vision.options import parse_options
from fairseq_codistill.vision.train import main as codistill_vision
from fairseq_codistill.vision.wide_resnet import WideResNet, parse_name, view_channels
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.config import ConfigError


def model_of(*flags, seed=1):
    torch.manual_seed(seed)
    return make_model(parse_options(["--no-save", *flags]), 10)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def images(batch=4, size=8):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_wrn_28_10_has_the_size_of_the_literature():
    assert parse_name("wrn28_10") == (28, 10)
    assert parse_name("resnet50") is None
    with torch.device("meta"):
        model = WideResNet(28, 10, 10)
    assert count(model) == pytest.approx(36.5e6, rel=2e-3)
    assert model.group2[0].conv1.in_channels == 160


def test_wide_residual_networks_learn_from_every_parameter():
    model = model_of("--model", "wrn16_1")
    model(images()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("name", ["wrn28", "wrn27_10", "wrn4_1", "wrn28_0", "resnet5000", "none_such"])
def test_an_unknown_model_is_named(name):
    with pytest.raises(ConfigError, match=name):
        model_of("--model", name)


def test_a_model_of_timm_takes_its_own_settings():
    model = model_of(
        "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "depth=2", "drop_path_rate=0.1"
    )
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert len(model.blocks) == 2
    with pytest.raises(ConfigError, match="no_such_setting"):
        model_of("--model", "resnet18", "--model-kwargs", "no_such_setting=1")


def test_a_model_of_another_image_size_is_refused_before_training(tmp_path, capsys):
    settings = "--model vit_tiny_patch16_224 --image-size 32 --dataset fake --max-updates 1 --cpu --save-dir"
    assert codistill_vision([*settings.split(), str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "--model is 'vit_tiny_patch16_224', made for images of 224 pixels; those of 32" in said
    assert "--model-kwargs img_size=32" in said


def test_only_what_a_model_of_one_size_does_not_take_is_refused():
    model = model_of("--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "depth=1")
    refuse_size(model, "vit_tiny_patch16_224", 32)
    assert model.training
    with pytest.raises(ConfigError, match="--teacher-model is 'vit_tiny_patch16_224'.* set --image-size 224$"):
        refuse_size(model, "vit_tiny_patch16_224", 64, "--teacher-model")
    assert model.training
    refuse_size(model_of("--model", "resnet10t"), "resnet10t", 33)


@given(st.integers(1, 8), st.integers(1, 40))
def test_views_are_disjoint_and_cover_all_channels(num_splits, size):
    splits = [view_channels(num_splits * size, split, num_splits) for split in range(num_splits)]
    assert [channel for split in splits for channel in split] == list(range(num_splits * size))
    assert {len(split) for split in splits} == {size}


def test_the_160_channels_of_wrn_28_10_are_cut_into_8_times_20():
    with torch.device("meta"):
        models = [WideResNet(28, 10, 10, view=(split, 8)) for split in range(8)]
    assert sorted(channel for model in models for channel in model.view) == list(range(160))
    assert {model.group2[0].conv1.in_channels for model in models} == {20}


def test_a_model_sees_its_own_view_and_no_other():
    codistilled = "--codistill-num-models 2 --codistill-addresses h:1,h:2 --codistill-model-index 1".split()
    model = model_of("--model", "wrn10_1", "--view", "model", *codistilled).eval()
    assert list(model.view) == [2, 3]
    before = model(images())
    last = model.group1[-1]
    for channel, changes in ((1, False), (2, True), (3, True), (4, False)):
        weight = last.conv2.weight.detach().clone()
        with torch.no_grad():
            last.conv2.weight[channel] += 1
        assert torch.equal(model(images()), before) != changes
        with torch.no_grad():
            last.conv2.weight.copy_(weight)


@pytest.mark.parametrize(
    ("flags", "flag"), [("--view 9 --num-views 10", "--num-views"), ("--view 0 --num-views 3", "3")]
)
def test_channels_that_cannot_be_cut_are_an_error(flags, flag):
    with pytest.raises(ConfigError, match=flag):
        model_of("--model", "wrn10_1", *flags.split())


@pytest.mark.parametrize("flags", ["--view 0", "--freeze-first-group", "--first-group x.pt"])
def test_views_of_other_models_are_refused(flags):
    with pytest.raises(ConfigError, match="wide residual networks only"):
        model_of("--model", "resnet18", *flags.split())


def test_the_first_group_is_taken_from_a_checkpoint(tmp_path):
    source = model_of("--model", "wrn10_2", seed=5)
    torch.save({"model": source.state_dict()}, tmp_path / "source.pt")
    model = model_of("--model", "wrn10_2", "--view", "3", "--first-group", str(tmp_path / "source.pt"), seed=6)
    for name, value in model.state_dict().items():
        if name.startswith(("stem.", "group1.")):
            assert torch.equal(value, source.state_dict()[name]), name
    assert not torch.equal(model.classifier.weight, source.classifier.weight)
    with pytest.raises(ConfigError, match=r"no fitting group1\.0\.norm2"):
        model_of("--model", "wrn10_1", "--first-group", str(tmp_path / "source.pt"))
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "source.pt").read_bytes()[:-900])
    (tmp_path / "empty.pt").touch()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    for name in ("nowhere", "damaged.pt", "empty.pt", "weights.pt"):
        with pytest.raises(ConfigError, match=f"--first-group is .*{name}', which cannot be read"):
            model_of("--model", "wrn10_1", "--first-group", str(tmp_path / name))


def test_a_value_that_is_no_yaml_is_named():
    with pytest.raises(ConfigError, match="--model-kwargs has 'a={'"):
        model_of("--model", "resnet18", "--model-kwargs", "a={")


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_group_keeps_its_parameters_and_statistics_and_a_free_one_does_not(frozen):
    flags = ["--freeze-first-group"] if frozen else []
    config = parse_options(["--no-save", "--model", "wrn10_1", "--weight-decay", "0.1", "--norm-weight-decay", *flags])
    torch.manual_seed(1)
    model = make_model(config, 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(config, model)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    first = {name for name in before if name.startswith(("stem.", "group1."))}
    assert changed >= before.keys() - first
    assert (changed & first == set()) if frozen else (changed == before.keys())


def test_weight_decay_spares_biases_and_normalisation_unless_told_otherwise():
    config = parse_options("--no-save --weight-decay 0 1e-4 --weight-decay-milestones 3 --model wrn10_1".split())
    groups = make_optimizer(config, make_model(config, 10)).param_groups
    assert {group["is_decayed"] for group in groups} == {True, False}
    for group in groups:
        assert all((parameter.dim() > 1) == group["is_decayed"] for parameter in group["params"])
    config.norm_weight_decay = True
    assert [group["is_decayed"] for group in make_optimizer(config, make_model(config, 10)).param_groups] == [True]
    config.optimizer = "none_such"
    with pytest.raises(ConfigError, match="--optimizer is 'none_such'"):
        make_optimizer(config, make_model(config, 10))


@pytest.mark.parametrize("name", ["adahessian", "lookahead_adahessian"])
def test_an_optimizer_of_second_order_is_refused_before_the_first_update(name):
    config = parse_options(["--no-save", "--optimizer", name])
    with pytest.raises(ConfigError, match=f"--optimizer is '{name}', which takes second derivatives"):
        make_optimizer(config, torch.nn.Linear(2, 2))


def test_the_distance_is_the_norm_over_the_trained_parameters():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    distance = Distance(model)
    assert distance() == 0.0
    with torch.no_grad():
        model.weight += torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        model.bias += 100
    assert distance() == pytest.approx(5.0)
