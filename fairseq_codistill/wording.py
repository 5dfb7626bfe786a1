"""Owns how errors name a setting to whoever wrote Python and not a command line."""

import re

from fairseq_codistill.option import ConfigError


class NamedAsArguments:
    """Lets a ConfigError speak of arguments: ``weight_growth`` where it says ``--codistill-weight-growth``."""

    def __init__(self, is_on: bool):
        self._is_on = is_on

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._is_on and isinstance(error, ConfigError):
            text = re.sub(
                r"--(?:codistill-([a-z-]+)|seed\b)", lambda flag: (flag[1] or "seed").replace("-", "_"), str(error)
            )
            raise ConfigError(text) from error
