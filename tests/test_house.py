"""The layout: which module may import which, what lies at the root, and whether CONTRIBUTING's map is complete."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPO

COMMANDS = {"train", "eval", "compare"}
# From top to bottom: a package imports from floors below its own, and from others of its own floor without a cycle.
FLOORS: list[set[str]] = [
    COMMANDS,
    {"features"},
    {"launch"},
    {"judging"},
    {"autoencoders", "trainers", "sampling"},
    {"training"},
    {"models"},
    {"dataloader", "modeling"},
    {"sae", "data", "distributed"},
    {"utils"},
]
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}
DOORS = 8  # modules at the root


def modules(house: Path) -> dict[str, Path]:
    """The modules at the root and in the wings (directories with an __init__.py) by their dotted names."""
    found = {path.stem: path for path in house.glob("*.py")}
    wings = [path.parent for path in house.glob("*/__init__.py")]
    return found | {f"{wing.name}.{path.stem}": path for wing in wings for path in wing.glob("*.py")}


def imports(path: Path) -> set[str]:
    """The dotted names that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module or "")
    return found


def packages(house: Path) -> dict[str, dict[str, set[str]]]:
    """For each package (a wing, or a module at the root): the packages of the house it imports, and which files do."""
    there = modules(house)
    names = {name.split(".")[0] for name in there}
    graph: dict[str, dict[str, set[str]]] = {name: {} for name in names}
    for name, path in there.items():
        package = name.split(".")[0]
        for other in {imported.split(".")[0] for imported in imports(path)} & names - {package}:
            graph[package].setdefault(other, set()).add(str(path.relative_to(house)))
    return graph


def faults(house: Path) -> list[str]:
    """What is against the layout, a line each."""
    graph, found = packages(house), []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a cycle between packages: {' <- '.join(error.args[1])}")
    for package in sorted(graph):
        if package not in FLOOR:
            found.append(f"{package} is on no floor")
            continue
        for other, files in sorted(graph[package].items()):
            for file in sorted(files):
                if other in COMMANDS:
                    found.append(f"{file} imports the command {other}")
                elif FLOOR.get(other, len(FLOORS)) < FLOOR[package]:
                    found.append(f"{file} imports {other}, which is on a floor above {package}")
    for path in sorted(house.glob("*/__init__.py")):
        if path.read_text().strip():
            found.append(f"{path.relative_to(house)} is not empty")
    doors = sorted(path.name for path in house.glob("*.py"))
    if len(doors) > DOORS:
        found.append(f"{len(doors)} modules at the root, more than {DOORS}: {', '.join(doors)}")
    return found


def test_the_house_is_in_order():
    assert faults(REPO) == []


@pytest.fixture
def small_house(tmp_path) -> Path:
    for name, text in {
        "train.py": "from launch import plan\nimport utils\n",
        "eval.py": "",
        "compare.py": "from judging import tables\n",
        "utils.py": "import json\n",
        "launch/plan.py": "def later():\n    from training.loop import train\n",
        "judging/tables.py": "",
        "training/loop.py": "from utils import thing\n",
        "data/rows.py": "",
        "distributed/parallel.py": "from data.rows import Row\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        if path.parent != tmp_path:
            (path.parent / "__init__.py").touch()
    return tmp_path


def test_a_small_house_is_in_order(small_house):
    assert faults(small_house) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("training/loop.py", "import train\n", "training/loop.py imports the command train"),
        ("compare.py", "import train\n", "compare.py imports the command train"),
        (
            "training/loop.py",
            "def f():\n    from launch import plan\n",
            "training/loop.py imports launch, which is on a",
        ),
        ("data/rows.py", "import distributed.parallel\n", "a cycle between packages: "),
        ("utils.py", "from data import rows\n", "utils.py imports data, which is on a floor above utils"),
        ("data/__init__.py", "from data import rows\n", "data/__init__.py is not empty"),
        ("helpers.py", "", "helpers is on no floor"),
    ],
)
def test_faults_are_found(small_house, file, text, fault):
    (small_house / file).write_text(text)
    assert [found for found in faults(small_house) if found.startswith(fault)]


def test_a_ninth_module_at_the_root_is_found(small_house):
    for number in range(5):
        (small_house / f"more{number}.py").touch()
    assert [found for found in faults(small_house) if found.startswith("9 modules at the root, more than 8: ")]


def test_wings_and_modules_are_on_the_map():
    """In CONTRIBUTING's table a row is a module at the root, or a module of the wing that a row above it names."""
    section = (REPO / "CONTRIBUTING.md").read_text().split("## Where things are\n")[1].split("\n## ")[0]
    mapped, wing = set(), ""
    for first, second in re.findall(r"^\|([^|]*)\| (.*) \|$", section, re.MULTILINE):
        places = re.findall(r"`([^`]+)`", first)
        mapped |= {place for place in places if place.endswith(".py")}
        wing = next((place for place in places if place.endswith("/")), wing)
        if module := re.match(r"`(\w+)`: ", second):
            mapped.add(f"{wing}{module[1]}.py")
    there = {str(path.relative_to(REPO)) for path in modules(REPO).values() if path.name != "__init__.py"}
    assert mapped == there
