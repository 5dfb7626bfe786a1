"""Makes what pyproject.toml cannot say: the page that a package index shows of README.md, and archives to compare.

With ``SOURCE_DATE_EPOCH`` in the environment the same files give the same source distribution, byte for byte: entries
in order, at that moment, of nobody. setuptools itself does as much for the wheel.

An index shows the text without the files beside it, where a relative link leads nowhere. With an address under
``Source`` in ``[project.urls]`` of pyproject.toml relative links become absolute ones to it; without one their text
stays and the link goes.
"""

import gzip
import os
import re
import sys
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

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


class ReproducibleSdist(sdist):
    """A source distribution in which nothing is of the machine or the moment that made it."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """As of setuptools, but where ``SOURCE_DATE_EPOCH`` is set and the format is ``gztar``."""
        moment = os.environ.get("SOURCE_DATE_EPOCH")
        if moment is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        if not moment.isdecimal():
            raise SystemExit(f"SOURCE_DATE_EPOCH is {moment!r}; it must be whole seconds since 1970")
        top = Path(root_dir or ".") / (base_dir or ".")
        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=int(moment)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for file in sorted([top, *top.rglob("*")]):
                entry = archive.gettarinfo(str(file), arcname=str(file.relative_to(top.parent)))
                entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = int(moment), 0, 0, "", ""
                entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
                if entry.isreg():
                    with file.open("rb") as content:
                        archive.addfile(entry, content)
                else:
                    archive.addfile(entry)
        return path


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        cmdclass={"sdist": ReproducibleSdist},
        long_description=index_page(
            (HERE / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Source", "")
        ),
        long_description_content_type="text/markdown",
    )
