"""Every setting that cannot work is refused by its flag, its value and what it must be."""

import dataclasses

import pytest

from fairseq_codistill.config import (
    CodistillationConfig,
    ConfigError,
    FairseqConfig,
    LabelSmoothingConfig,
    flag_name,
)
from fairseq_codistill.environment import refuse_to_be_alone

TWO = {"codistill_num_models": 2, "codistill_addresses": "a:1,b:2"}


def test_the_defaults_and_a_plain_pair_are_valid():
    CodistillationConfig().validate()
    CodistillationConfig(**TWO).validate()
    LabelSmoothingConfig().validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codistill_num_models", 0),
        ("codistill_model_index", 2),
        ("codistill_model_index", -1),
        ("codistill_addresses", ""),
        ("codistill_addresses", "a:1,b:2,c:3"),
        ("codistill_weight", -0.1),
        ("codistill_weight", float("nan")),
        ("codistill_weight_growth", 0.0),
        ("codistill_weight_growth", float("inf")),
        ("codistill_weight_max", float("inf")),
        ("codistill_weight_max", 0.5),
        ("codistill_burn_in", -1),
        ("codistill_divergence", "l1"),
        ("codistill_codec", "fp8"),
        ("codistill_timeout", -1.0),
        ("codistill_start_timeout", float("inf")),
        ("codistill_max_message_mb", 0),
        ("codistill_max_queue_mb", 0),
        ("codistill_max_mismatches", 0),
    ],
)
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as error:
        CodistillationConfig(**{**TWO, name: value}).validate()
    assert flag_name(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("label_smoothing_end", 2.0),
        ("label_smoothing_decay_updates", -1),
        ("label_smoothing_decay_epochs", -1),
        ("label_smoothing_drop_epoch", -1),
    ],
)
def test_bad_label_smoothing_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{flag_name(name)} is {value!r}"):
        LabelSmoothingConfig(**{name: value}).validate()


def test_two_decays_at_once_are_refused():
    with pytest.raises(ConfigError, match="only one"):
        LabelSmoothingConfig(label_smoothing_decay_updates=5, label_smoothing_decay_epochs=5).validate()


def test_an_end_of_label_smoothing_to_which_nothing_decays_is_refused():
    with pytest.raises(ConfigError, match=r"--label-smoothing-end is 0.02, to which nothing decays; give --label-smo"):
        LabelSmoothingConfig(label_smoothing=0.1, label_smoothing_end=0.02).validate()
    LabelSmoothingConfig(label_smoothing=0.1, label_smoothing_end=0.02, label_smoothing_decay_epochs=1).validate()


def test_every_option_has_a_help_text():
    for config in (CodistillationConfig, FairseqConfig, LabelSmoothingConfig):
        assert all(field.metadata["help"] for field in dataclasses.fields(config))


def test_every_flag_is_the_one_users_have_in_their_scripts():
    # Renaming or removing one breaks their scripts: add it here only with an entry in CHANGELOG.md.
    flags = {field.name for config in (CodistillationConfig, FairseqConfig) for field in dataclasses.fields(config)}
    assert flags == {
        "codistill_" + name
        for name in (
            "num_models", "model_index", "addresses", "bind", "run_id", "data_seed", "weight", "weight_growth",
            "weight_max", "validate_agreement",
            "burn_in", "divergence", "codec", "timeout", "start_timeout", "max_message_mb", "max_queue_mb",
            "max_mismatches",
            "allow_identical_init", "interval", "keys", "exchange", "replica_mode", "replica_wait", "transport",
            "require_peers", "parts", "lookahead", "teacher", "teacher_device", "teacher_cache",
            "teacher_codec", "peers_per_position", "budget_mbit", "divergence_beta", "temperature", "peer_weights",
            "relay", "own_data", "transfer",
        )
    }  # fmt: skip


@pytest.mark.parametrize("codec", ["int8", "columns:4", "tokens:4", "topk:4"])
def test_parameters_travel_in_a_float_dtype(codec):
    with pytest.raises(ConfigError, match="parameters travel as one of fp32, fp16, bf16"):
        CodistillationConfig(codistill_exchange="checkpoints", codistill_codec=codec).validate()
    CodistillationConfig(codistill_exchange="checkpoints", codistill_codec="bf16").validate()


@pytest.mark.parametrize(
    "change",
    [
        {"codistill_exchange": "gradients"},
        {"codistill_replica_mode": "both"},
        {"codistill_transport": "mpi"},
        {"codistill_require_peers": "some"},
    ],
)
def test_unknown_exchanges_and_modes_are_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is '{value}'; it must be one of"):
        CodistillationConfig(**change).validate()


def test_nccl_is_refused_with_what_to_use_instead():
    with pytest.raises(ConfigError, match=r"--codistill-transport is 'nccl'.* Use gloo or zmq"):
        CodistillationConfig(codistill_transport="nccl").validate()


def test_a_program_that_the_launcher_told_through_a_script_is_not_trained_alone():
    told = {"CODISTILL_NUM_MODELS": "2", "CODISTILL_MODEL_INDEX": "1", "CODISTILL_ADDRESSES": "a:1,b:1"}
    with pytest.raises(ConfigError, match=r"CODISTILL_NUM_MODELS is 2 .*alone.*-index \$CODISTILL_MODEL_INDEX"):
        refuse_to_be_alone(1, told)
    refuse_to_be_alone(2, told)
    refuse_to_be_alone(1, {})
    refuse_to_be_alone(1, {"CODISTILL_NUM_MODELS": "1"})
