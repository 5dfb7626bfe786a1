"""Settings from arguments of Python and from the environment: what is read, what is refused, what is told."""

import pytest

from fairseq_codistill import ConfigError
from fairseq_codistill.environment import config_from_environment


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"codek": "fp16"}, {}, "codek is no setting of codistillation; did you mean codec"),
        ({"interval": 1.5}, {}, "interval is 1.5; it must be of type int"),
        ({}, {"CODISTILL_INTERVAL": "often"}, "CODISTILL_INTERVAL is 'often' in the environment"),
        ({}, {"CODISTILL_REPLICA_WAIT": "perhaps"}, "CODISTILL_REPLICA_WAIT is 'perhaps'"),
        ({}, {"CODISTILL_CODDEC": "fp32"}, "CODISTILL_CODDEC in .* did you mean CODISTILL_CODEC?"),
        ({}, {"CODISTILL_TEMPERATUR": "2"}, "did you mean CODISTILL_TEMPERATURE?"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(settings, environment, message):
    with pytest.raises(ConfigError, match=message):
        config_from_environment(settings, environment)


def test_a_number_is_taken_for_a_setting_that_is_a_word_and_what_is_no_setting_at_all_is_told(caplog):
    config = config_from_environment({"parts": 2}, {"CODISTILL_HOME": "/x"})
    assert config.codistill_parts == "2"
    assert "CODISTILL_HOME in the environment is no setting" in caplog.text
    with pytest.raises(ConfigError, match="parts is True; it must be of type str"):
        config_from_environment({"parts": True}, {})


@pytest.mark.parametrize(
    "name", "PORT MODEL DATA DATA_DIR DATASET RUN_DIR CACHE RELAY_PORT RELAY_HOST NUM_NODES".split()
)
def test_a_variable_of_somebody_else_is_none_that_is_misspelt(name, caplog):
    config_from_environment({}, {f"CODISTILL_{name}": "tcp://10.0.0.1:80", "CODISTILL_CODDEC": ""})
    assert caplog.text.count("is no setting of codistillation") == 1
