"""What the documents say, against what is so."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DATA, REPO
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import compare
import dataloader
from launch import settings, summary
from training.quantities import QUANTITIES

README = (REPO / "README.md").read_text()
CONTRIBUTING = (REPO / "CONTRIBUTING.md").read_text()
PAGES = [page for pattern in ("*.md", "assets/*.md", "docs/*.md") for page in sorted(REPO.glob(pattern))]
DOCUMENTS = {page: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = re.findall(r"^## (Add .*)$", CONTRIBUTING, re.MULTILINE)


def commands(script: str) -> list[list[str]]:
    """The arguments of every `python <script>` in a shell block of the documents, those of the recipes left out."""
    texts = [text for path, text in DOCUMENTS.items() if path.name != "CONTRIBUTING.md"]
    blocks = [body for text in texts for language, body in BLOCK.findall(text) if language == "bash"]
    lines = "".join(blocks).replace("\\\n", " ").replace(" && ", "\n").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith(f"python {script}")]


@pytest.fixture
def configuration() -> Iterator[None]:
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        yield


# ------------------------------------------------------------------------------------------------------- installing


def test_every_way_of_installing_gives_the_same_pins():
    pins = (REPO / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
    environment = OmegaConf.to_container(OmegaConf.load(REPO / "environment.yml"))
    assert isinstance(environment, dict) and environment["name"] == "halos"
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["dependencies"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert project["project"]["requires-python"] == ">=3.11"
    manual = README.split("## Installing by hand")[1]
    assert "conda env create -f environment.yml && conda activate halos\n" in manual
    assert "\npip install -r requirements.txt\n" in manual


def test_ci_runs_the_readmes_test_command():
    wanted = re.search(r"grep -x '(.*)' README.md", (REPO / ".ci/run").read_text())
    assert wanted
    found = [line for line in README.splitlines() if re.fullmatch(wanted[1], line)]
    assert found == ["pip install -r requirements.txt -e '.[dev]' && scripts/check"]


# --------------------------------------------------------------------------------------------------------- commands


@pytest.mark.usefixtures("configuration")
@pytest.mark.parametrize("arguments", commands("train.py"), ids=" ".join)
def test_train_command_is_sound(arguments, monkeypatch):
    monkeypatch.chdir(REPO)
    if any("../shared/data" in argument for argument in arguments) and not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    arguments = settings.translate_arguments(arguments)
    settings.check_overrides(arguments)
    settings.check_config(compose("config", overrides=arguments))


@pytest.mark.usefixtures("configuration")
@pytest.mark.parametrize("arguments", commands("eval.py"), ids=" ".join)
def test_eval_command_is_sound(arguments):
    path, *overrides = arguments
    assert path.startswith("--config-path=")
    settings.check_overrides(overrides)


@pytest.mark.parametrize("arguments", commands("compare.py"), ids=" ".join)
def test_compare_command_is_sound(arguments, monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *_: None)
    compare.main(arguments)  # exits where it does not know a flag


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("group", ["loss", "model", "sae", "experiment"])
def test_readme_lists_what_can_be_chosen(group):
    there = {path.stem for path in (REPO / "config" / group).glob("*.yaml")} - {"base"}
    listed = set(re.findall(r"`([\w.-]+)`", README))
    assert there - listed == set()
    for path, text in DOCUMENTS.items():
        named = set(re.findall(rf"(?<![\w.]){group}=([\w-][\w.-]*\b)", text))
        assert path.name == "CONTRIBUTING.md" or named - there == set(), path


@pytest.mark.parametrize("document", ["README.md", "docs/data.md"])
def test_documents_list_every_data_set(document):
    listed = set(re.findall(r"`(\w+)`", (REPO / document).read_text()))
    assert set(dataloader.named_loaders()) - listed == set()


def test_losses_document_has_every_quantity_and_figure():
    listed = set(re.findall(r"`(\w+)`", (REPO / "docs/losses.md").read_text()))
    assert {*QUANTITIES, *summary.FIGURE_NAMES} - listed == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(path):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", DOCUMENTS[path]):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], heading


def test_modules_are_on_the_map():
    modules = {path.name for path in REPO.glob("*.py")}
    assert modules - set(re.findall(r"`(\w+\.py)`", CONTRIBUTING)) == set()


# ------------------------------------------------------------------------------------------------------------ sizes


def test_files_are_small():
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    sizes = {name: (REPO / name).stat().st_size for name in names.split("\0") if (REPO / name).is_file()}
    assert not [name for name, size in sizes.items() if size > 3e6 and not name.startswith("assets/")]
    assert sum(size for name, size in sizes.items() if name.startswith("assets/")) <= 12e6


# ---------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of this repo to follow the recipes in."""
    target = tmp_path_factory.mktemp("recipes") / "repo"
    left = shutil.ignore_patterns(".*", "__pycache__", "outputs", "samples", "*.egg-info")
    return Path(shutil.copytree(REPO, target, ignore=left))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_works_as_written(recipe, copy):
    section = CONTRIBUTING.split(f"## {recipe}\n")[1].split("\n## ")[0]
    python = Path(sys.executable).parent
    for language, body in BLOCK.findall(section):
        if language == "bash":
            environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}"}
            shell = ["bash", "-euc", body]
            done = subprocess.run(shell, cwd=copy, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            first, _, rest = body.partition("\n")
            what = re.fullmatch(r"# (add to|new file) (\S+)", first)
            assert what, first
            path = copy / what[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            assert path.exists() == (what[1] == "add to")
            with path.open("a") as file:
                file.write(rest)


@pytest.mark.slow
def test_the_readmes_custom_trainer_runs_as_written(copy):
    (code,) = [body for language, body in BLOCK.findall(README) if "class CustomKTOTrainer" in body]
    (line,) = re.findall(r"`(python train\.py loss=unpaired [^`]*)`", README)
    (copy / "my_trainers.py").write_text(code)
    few = ["n_examples=64", "n_eval_examples=16", "toy_comparison=null"]
    command = [sys.executable, *shlex.split(line)[1:], *few]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
