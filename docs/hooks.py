"""Owns what the site of mkdocs.yml needs beyond its pages: README and changelog, and links that leave the folder.

A link from a page to a file of the repository becomes an address where pyproject.toml names one under ``Source``, and
its text elsewhere. One that leads nowhere is a warning, which ``--strict`` makes an error.
"""

import logging
import os
import re
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
# [text](target) or ![text](target), where the target has no scheme and is no place on the page itself.
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^][]*)\]\((?!#|[a-z]+:)(?P<target>[^)\s#]*)(?P<place>#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.hooks")


def on_files(files, config):
    """Pages that lie outside the folder, and pictures of ``results/`` that pages show."""
    for name, origin in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / origin)))
    pictures = set()
    for file in files.documentation_pages():
        origin = origin_of(file.src_uri)
        for link in LINK.finditer(origin.read_text(encoding="utf-8")):
            picture = (origin.parent / link["target"]).resolve()
            if link["image"] and not picture.is_relative_to(ROOT / "docs") and picture.is_file():
                pictures.add(picture)
    for picture in sorted(pictures):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, f"from/{name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The links of a page, as the site has what they name."""
    origin = origin_of(page.file.src_uri)
    source = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"].get("Source", "")

    def mended(link):
        target = (origin.parent / link["target"]).resolve()
        place = link["place"] or ""
        name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if not name or not target.exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, link["target"])
            return link["text"]
        inside = {origin: page for page, origin in PAGES.items()}.get(name)
        if target.is_relative_to(ROOT / "docs"):
            inside = target.relative_to(ROOT / "docs").as_posix()
        elif link["image"]:
            inside = f"from/{name}"
        if inside is not None and files.get_file_from_path(inside) is not None:
            way = os.path.relpath(inside, os.path.dirname(page.file.src_uri) or ".")
            return f"{link['image']}[{link['text']}]({way}{place})"
        return f"[{link['text']}]({source.rstrip('/')}/blob/HEAD/{name}{place})" if source else link["text"]

    parts = FENCE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(mended, part) for number, part in enumerate(parts))


def origin_of(name):
    """The file that a page is made of."""
    return ROOT / PAGES[name] if name in PAGES else ROOT / "docs" / name
