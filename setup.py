"""Makes the page that a package index shows of README.md; every other setting is in pyproject.toml.

An index shows the text without the files beside it, where a relative link leads nowhere. With an address under
``Source`` in ``[project.urls]`` of pyproject.toml relative links become absolute ones to it; without one their text
stays and the link goes.
"""

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
# [text](target) or ![text](target), where the target has no scheme and is no place on the page itself.
RELATIVE_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^][]*)\]\((?!#|[a-z]+:)(?P<target>[^)\s]+)\)")


def index_page(readme: str, source: str) -> str:
    """``readme`` for a package index.

    Args:
        readme: Markdown, with links relative to the root of the repository.
        source: address of the repository, ``https://HOST/OWNER/NAME``, or ``""`` where it has none.

    Returns:
        Markdown whose links all have an address.
    """

    def mended(link: re.Match[str]) -> str:
        if not source:
            return link["text"]
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({source.rstrip('/')}/{kind}/HEAD/{link['target']})"

    # In fenced and indented code, models[0](inputs) is no link.
    parts = re.split(r"(^```.*?^```|^ {4}.*?$)", readme, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else RELATIVE_LINK.sub(mended, part) for number, part in enumerate(parts))


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=index_page(
            (HERE / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Source", "")
        ),
        long_description_content_type="text/markdown",
    )
