"""Owns how errors name a setting to whoever wrote Python and not a command line."""

import re

from fairseq_codistill.option import ConfigError

FLAG = re.compile(r"--(?:codistill-([a-z-]+)|seed\b)")


class NamedAsArguments:
    """Lets an error that names a flag speak of arguments: ``weight_growth`` for ``--codistill-weight-growth``.

    Of a ConfigError, or of what is raised while the others are met.
    """

    def __init__(self, is_on: bool):
        self._is_on = is_on

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._is_on and isinstance(error, (ConfigError, RuntimeError)) and FLAG.search(str(error)):
            text = FLAG.sub(lambda flag: (flag[1] or "seed").replace("-", "_"), str(error))
            raise type(error)(text) from error
