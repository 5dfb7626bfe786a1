"""Owns how settings are found by a program without a command line: arguments of Python, then the environment.

What the settings are is decided in ``config``. Nothing here imports fairseq or torch.
"""

import dataclasses
import difflib
import logging
import os
from collections.abc import Mapping
from typing import Any

from fairseq_codistill.config import CodistillationConfig, ConfigError, flag_name

logger = logging.getLogger(__name__)
PREFIX = "CODISTILL_"


def environment_name(flag: str) -> str:
    """``--codistill-num-models`` -> ``CODISTILL_NUM_MODELS``: where a loop of one's own finds what is not given."""
    return flag.lstrip("-").replace("-", "_").upper()


def config_from_environment(
    settings: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> CodistillationConfig:
    """Validated options from arguments of Python, then the environment, then the defaults.

    Args:
        settings: names of the fields without ``codistill_`` -> values.
        environment: ``CODISTILL_NUM_MODELS`` and the like, as :func:`environment_name` gives them.

    Raises:
        ConfigError: a name that is none, or a value that cannot work.
    """
    fields = {field.name: field for field in dataclasses.fields(CodistillationConfig)}
    variables = {environment_name(flag_name(name)): name for name in fields}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if text == "":
            continue
        if variable in variables:
            values[variables[variable]] = _parsed(text, type(fields[variables[variable]].default), variable)
        elif variable.startswith(PREFIX):
            _is_no_setting(variable, list(variables))
    for name, value in settings.items():
        if f"codistill_{name}" not in fields:
            close = difflib.get_close_matches(f"codistill_{name}", fields, n=1)
            hint = f"; did you mean {close[0].removeprefix('codistill_')}?" if close else ""
            raise ConfigError(f"{name} is no setting of codistillation{hint}")
        wanted = type(fields[f"codistill_{name}"].default)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if wanted is str and is_number:  # parts=2
            value = str(value)
        if type(value) is not wanted and not (wanted is float and is_number):
            raise ConfigError(f"{name} is {value!r}; it must be of type {wanted.__name__}")
        values[f"codistill_{name}"] = value
    config = CodistillationConfig(**values)
    config.validate()
    return config


def data_seed_of_environment(environment: Mapping[str, str] = os.environ) -> int:
    """``CODISTILL_DATA_SEED``, for what orders batches before there is a configuration; else the default.

    Raises:
        ConfigError: it is no whole number.
    """
    variable, default = environment_name("--codistill-data-seed"), CodistillationConfig.codistill_data_seed
    return int(_parsed(environment.get(variable) or str(default), int, variable))


def refuse_to_be_alone(num_models: int, environment: Mapping[str, str] = os.environ) -> None:
    """Of a program that is told who it is by its options: whether ``codistill-launch`` has told its script instead.

    Raises:
        ConfigError: the environment says that it is one of several models, and its options that it is alone.
    """
    told = environment.get("CODISTILL_NUM_MODELS", "")
    if num_models == 1 and told.isdecimal() and int(told) > 1:
        flags = ("--codistill-num-models", "--codistill-model-index", "--codistill-addresses", "--codistill-keys")
        given = [f"{flag} ${environment_name(flag)}" for flag in flags if environment.get(environment_name(flag))]
        raise ConfigError(
            f"CODISTILL_NUM_MODELS is {told} in the environment, and --codistill-num-models is 1: it would be trained "
            f"alone. codistill-launch did not see it behind the script that starts it; there add {' '.join(given)}"
        )


def _is_no_setting(variable: str, variables: list[str]) -> None:
    """What is nearly the name of a setting is one that is misspelt; anything else may be somebody else's.

    As is CODISTILL_PORT, which Kubernetes sets beside a service of that name.
    """
    known = [name.removeprefix(PREFIX) for name in variables]
    if close := difflib.get_close_matches(variable.removeprefix(PREFIX), known, n=1, cutoff=0.85):
        raise ConfigError(
            f"{variable} in the environment is no setting of codistillation; did you mean {PREFIX}{close[0]}? "
            "Unset it, or a run would be trained without it"
        )
    logger.warning("codistillation: %s in the environment is no setting of codistillation", variable)


def _parsed(text: str, kind: type, variable: str) -> Any:
    choices = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        return choices[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{variable} is {text!r} in the environment; it must be of type {kind.__name__}") from error
