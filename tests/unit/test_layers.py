"""The floor plan: who may import whom, read from the source of every module, imports inside functions among them.

``LAYERS`` is the one place that lists the rooms of the package. An arrow from a module to what it imports points down.
"""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fairseq_codistill"
# Top to bottom. Rooms of one row stand side by side and do not know each other; inside a room only circles are wrong.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("launch",),
    ("relay",),
    ("tasks",),
    ("criterion",),
    ("integrations",),
    ("testing",),
    ("codistiller",),
    ("demo", "average"),
    ("report",),
    ("fairseq_side",),
    ("shared_set", "split_loop"),
    ("exchanger", "plain_loop", "untaught"),
    ("comparison", "remembered", "teachers", "lesson"),
    ("losses", "teacher_cache"),
    ("coordinator",),
    ("sampling",),
    ("advice", "command_line", "figures", "schedules", "lookahead", "nested", "ranks", "split_step", "workers"),
    ("recipe_command", "environment"),
    ("config", "paths", "whole_files", "wording"),
    ("sharing", "sources"),
    ("choices",),
    ("option",),
)
# Every training loop comes to the exchange through Codistiller. Of what is behind it an adapter knows no more than how
# a batch is named and the error of batches that differ.
ADAPTERS = frozenset("criterion integrations vision".split())
BEHIND = frozenset(
    "comparison shared_set split_loop exchanger plain_loop remembered lesson teachers teacher_cache losses".split()
    + ["coordinator", "untaught"]
)
IN_FRONT = frozenset("coordinator.keys coordinator.coordinator".split())
# vision is a user of the package, as any other training loop: it takes what knows no framework, and the form of a plan.
FOR_VISION = frozenset(
    "launch.programs codistiller coordinator figures lookahead ranks sampling schedules split_step workers config "
    "environment option paths whole_files".split()
)
# Which libraries a room must not import, not even inside a function: they are its hosts' affair.
HOSTS = frozenset("fairseq fairseq_cli omegaconf hydra timm torchvision transformers".split())
WITHOUT: dict[str, frozenset[str]] = {
    **dict.fromkeys(("codistiller", "exchanger", "plain_loop", "untaught", "losses", "coordinator"), HOSTS),
    **dict.fromkeys(
        ("comparison", "shared_set", "split_loop", "remembered", "lesson", "teachers", "teacher_cache"), HOSTS
    ),
    **dict.fromkeys(("figures", "lookahead", "nested", "ranks", "sampling", "split_step", "workers"), HOSTS),
    **dict.fromkeys(
        (
            "advice",
            "choices",
            "sharing",
            "command_line",
            "config",
            "environment",
            "paths",
            "schedules",
            "report",
            "sources",
            "option",
            "whole_files",
            "wording",
        ),
        HOSTS | {"torch"},
    ),
    "whole_files": HOSTS | {"torch"},
    "launch": HOSTS - {"fairseq"},  # a dry run asks fairseq for the architecture
    "vision": HOSTS - {"timm", "torchvision"},
}
MAX_LINES = 400


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of the package.

    Attributes:
        name: in the package, ``""`` for the package itself, ``losses.chunked``; a folder's ``__init__`` has its name.
        ours: names of the modules of the package that it imports; ``""`` for what the package itself defines.
        libraries: top names of everything else that it imports.
    """

    name: str
    ours: frozenset[str]
    libraries: frozenset[str]

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_module(name: str, is_folder: bool, source: str, known: Iterable[str]) -> Module:
    """What a module imports, anywhere in it; ``known`` are the names of all modules of the package."""
    known, here = set(known), [PACKAGE, *filter(None, name.split("."))]
    ours, libraries = set(), set()
    for node in ast.walk(ast.parse(source)):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + int(is_folder) - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # `from room import module` imports that module, `from module import name` the module
            targets = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            targets = [str(word.value).split(".") for word in node.args[:1] if isinstance(word, ast.Constant)]
        for top, *rest in targets:
            if top != PACKAGE:
                libraries.add(top)
                continue
            while rest and ".".join(rest) not in known:
                rest.pop()
            ours.add(".".join(rest))
    return Module(name, frozenset(ours), frozenset(libraries))


def read_package() -> dict[str, Module]:
    """Every module by name; the folder ``vision`` is the room that it is installed as."""
    files: dict[str, Path] = {}
    for top, home in (("fairseq_codistill", ()), ("vision", ("vision",))):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = (*home, *path.relative_to(ROOT / top).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        name: read_module(name, path.name == "__init__.py", path.read_text(encoding="utf-8"), files)
        for name, path in files.items()
    }


def row_of(room: str) -> int | None:
    return next((row for row, rooms in enumerate(LAYERS) if room in rooms), None)


def wrong_arrows(modules: Iterable[Module]) -> Iterator[str]:
    """A sentence for each import that the floor plan forbids."""
    for module in modules:
        if module.name == "":
            continue  # the package's own file hands out names of all rooms, lazily; another test holds that
        for target in sorted(module.ours):
            room = target.partition(".")[0]
            arrow = f"{module.name} imports {target or PACKAGE}"
            if module.room in ADAPTERS and room in BEHIND and target not in IN_FRONT:
                yield f"{arrow}: an adapter goes through codistiller"
            if module.room == "vision":
                allowed = room in ("vision", "") or target in FOR_VISION or room in FOR_VISION
                if not allowed:
                    yield f"{arrow}: vision takes only the neutral parts, {', '.join(sorted(FOR_VISION))}"
            elif room == "vision":
                yield f"{arrow}: the package must not know vision"
            elif room not in (module.room, ""):
                here, there = row_of(module.room), row_of(room)
                if here is None or there is None:
                    missing = module.room if here is None else room
                    yield f"{arrow}: {missing} has no place in LAYERS yet"
                elif there <= here:
                    yield f"{arrow}, which is {'beside' if there == here else 'above'} it: arrows point down"


def find_circle(modules: dict[str, Module]) -> list[str]:
    """The names along one circle of imports, its first again at the end; empty where there is none."""
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for target in sorted(modules[name].ours - {"", name}):
            circle = walk(target, [*path, name])
            if circle:
                return circle
        finished.add(name)
        return []

    return next((circle for circle in (walk(name, []) for name in modules if name) if circle), [])


@pytest.fixture(scope="module")
def modules():
    return read_package()


def test_every_arrow_points_down(modules):
    assert list(wrong_arrows(modules.values())) == []


def test_every_room_has_a_place_in_the_list(modules):
    rooms = {module.room for module in modules.values()} - {"", "vision"}
    assert sorted(room for room in rooms if row_of(room) is None) == []


def test_no_imports_go_in_a_circle(modules):
    assert find_circle(modules) == []


def test_a_room_keeps_clear_of_the_libraries_that_it_must_not_load(modules):
    found = {name: module.libraries & WITHOUT.get(module.room, frozenset()) for name, module in modules.items()}
    assert {name: sorted(libraries) for name, libraries in found.items() if libraries} == {}


def test_no_module_bears_the_name_of_a_library_that_the_package_imports(modules):
    libraries = frozenset().union(*(module.libraries for module in modules.values()))
    assert [name for name in modules if name.rpartition(".")[2] in libraries] == []


def test_the_package_defines_nothing_of_its_own_but_what_all_rooms_may_use(modules):
    """A room takes a name from the module that defines it: the package itself only hands names out, lazily."""
    taken = set()
    for top in ("fairseq_codistill", "vision"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == PACKAGE and not node.level:
                    taken |= {alias.name for alias in node.names}
    assert {name for name in taken if name not in modules} <= {"__version__"}


def test_no_file_is_longer_than_four_hundred_lines():
    folders = ("fairseq_codistill", "vision", "recipes", "benchmarks", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in paths}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_importing_the_package_loads_neither_torch_nor_fairseq():
    code = "import sys, fairseq_codistill; print(sorted({'torch', 'fairseq', 'numpy', 'zmq'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("losses.chunked", "import fairseq_codistill.criterion", "losses.chunked imports criterion, which is above it"),
        ("config", "def f():\n    from fairseq_codistill.launch import cli", "config imports launch.cli, which is abo"),
        ("exchanger", "from fairseq_codistill import plain_loop", "exchanger imports plain_loop, which is beside it"),
        ("launch.traffic", "from fairseq_codistill.vision import plan", "the package must not know vision"),
        ("losses.sweep", "from ..launch.cli import main", "losses.sweep imports launch.cli, which is above it"),
        ("paths", "import importlib\nimportlib.import_module('fairseq_codistill.losses')", "paths imports losses"),
        ("vision.engine", "from fairseq_codistill.fairseq_side import x", "vision takes only the neutral parts"),
        ("vision.plan", "from fairseq_codistill.launch.local import x", "vision takes only the neutral parts"),
        ("criterion", "from fairseq_codistill.losses import chunked", "an adapter goes through codistiller"),
        ("cellar", "from fairseq_codistill.config import x", "cellar has no place in LAYERS yet"),
    ],
)
def test_an_arrow_that_is_wrong_is_found(name, source, complaint):
    known = "config criterion fairseq_side launch.cli launch.local losses losses.sweep plain_loop vision.plan".split()
    (found,) = wrong_arrows([read_module(name, False, source, known)])
    assert complaint in found


@pytest.mark.parametrize(
    ("name", "is_folder", "source"),
    [
        (
            "vision.engine",
            False,
            "from .data import x\nfrom . import models\nfrom fairseq_codistill.codistiller import y",
        ),
        ("vision.plan", False, "from fairseq_codistill.launch.programs import Assumed"),
        ("losses", True, "from .chunked import x\nfrom fairseq_codistill import __version__"),
        ("criterion", False, "from fairseq_codistill.coordinator import keys"),
    ],
)
def test_an_arrow_that_is_right_is_left_alone(name, is_folder, source):
    known = "codistiller launch.programs losses losses.chunked vision.data vision.models coordinator.keys".split()
    assert list(wrong_arrows([read_module(name, is_folder, source, known)])) == []


def test_a_circle_is_found_also_through_a_function():
    known = ["a.one", "a.two", "a.three"]
    sources = {
        "a.one": "from fairseq_codistill.a.two import x",
        "a.two": "def f():\n    from fairseq_codistill.a import three",
        "a.three": "from .one import y",
    }
    circle = find_circle({name: read_module(name, False, source, known) for name, source in sources.items()})
    assert circle == ["a.one", "a.two", "a.three", "a.one"]
