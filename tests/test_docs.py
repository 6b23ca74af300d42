"""What the documents say, against what is so."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from composition import composed
from conftest import DATA, REPO
from conftest import command as run_command
from omegaconf import DictConfig, OmegaConf
from test_plan import CARD, plan_for_cards

import compare
import dataloader
from benchmarks import control, prediction
from launch import plan, report, settings
from training.quantities import QUANTITIES

README = (REPO / "README.md").read_text()
CONTRIBUTING = (REPO / "CONTRIBUTING.md").read_text()
PLACES = ("*.md", "assets/*.md", "docs/*.md", "docs/dev/*.md", "tests/data/*.md")
DOCUMENTS = {str(page.relative_to(REPO)): page.read_text() for place in PLACES for page in sorted(REPO.glob(place))}
FOR_USERS = [name for name in DOCUMENTS if not name.startswith("docs/dev/")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```(\w+)\n(.*?)^```$|`(python [^`]*)`", re.MULTILINE | re.DOTALL)
RECIPES = re.findall(r"^## (Add .*)$", CONTRIBUTING, re.MULTILINE)


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
    manual = DOCUMENTS["docs/installing.md"]
    assert "conda env create -f environment.yml && conda activate halos\n" in manual
    assert "\npip install -r requirements.txt\n" in manual
    named = re.findall(r"pip install -e '\.\[([\w-]+)\]'", "".join(DOCUMENTS.values()))
    assert set(named) - project["project"]["optional-dependencies"].keys() == set()


def test_ci_runs_the_readmes_test_command():
    wanted = re.search(r"grep -x '(.*)' README.md", (REPO / ".ci/run").read_text())
    assert wanted
    found = [line for line in README.splitlines() if re.fullmatch(wanted[1], line)]
    assert found == ["pip install -r requirements.txt -e '.[dev]' && scripts/check"]


# ------------------------------------------------------------------------------------------------- commands, by page


class Command(NamedTuple):
    """A command of a page, and what the page has made before it: paths, with the text of the files that it spells."""

    words: list[str]
    made: dict[str, str | None]

    @property
    def program(self) -> str:
        """The script, also if a launcher starts it; else the first word."""
        scripts = ("train.py", "eval.py", "compare.py", "scripts/slurm.sh", "scripts/online.sh")
        return next((word for word in self.words if word in scripts), self.words[0])

    @property
    def arguments(self) -> list[str]:
        return self.words[self.words.index(self.program) + 1 :]

    @property
    def values(self) -> dict[str, str]:
        """The keys that are set, without the plus signs."""
        pairs = (word.lstrip("+-").partition("=") for word in self.arguments)
        return {key: value for key, equals, value in pairs if equals}


def commands(page: str) -> Iterator[Command]:
    """The commands of a page in order: those of shell blocks, and `python ...` in the text."""
    made: dict[str, str | None] = {}
    for language, body, inline in CODE.findall(DOCUMENTS[page]):
        if language and language != "bash":
            first, _, rest = body.partition("\n")
            if new := re.fullmatch(r"# new file (\S+)", first):
                made[new[1]] = rest
            continue
        lines = (inline.replace("\n", " ") if inline else body.replace("\\\n", " ")).replace(" && ", "\n").splitlines()
        for words in (shlex.split(line) for line in lines):
            while words and re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
                del words[0]
            if words:
                yield (command := Command(words, dict(made)))
                made |= dict.fromkeys(results(command))


def results(command: Command) -> list[str]:
    """The paths that a command makes."""
    words, values = command.words, command.values
    if command.program in ("train.py", "scripts/slurm.sh"):
        name = values.get("exp_name") or values.get("experiment") or f"{values.get('loss')}_{values.get('model')}"
        return [f"{values.get('cache_dir', 'outputs')}/{name}"]
    if command.program == "eval.py" and "config-path" in values:
        source, mode, folder = values["config-path"], values.get("mode", "sample"), values.get("samples_dir", "samples")
        name = values.get("exp_name") or Path(source.removesuffix("/config.yaml")).name
        if mode == "label":
            return [values["labels"]]
        measured = [f"{source}/{mode}", f"{source}/eval.json", f"outputs/{name}/features"]
        sampled = [f"{folder}/{name}.json", f"{folder}/{name}-{mode}.json", f"{folder}/alpaca_eval/{name}"]
        return measured if mode in ("eval", "features") else sampled
    if "--write_pairs" in words:
        return [words[words.index("--write_pairs") + 1]]
    if words[0] in ("cp", "mkdir") or words[:3] == ["python", "-m", "data.toy"]:
        return [words[-1].rstrip("/")]
    return []


# Keys, and flags, whose value is a path; True: or a place on the Hub
PATHS = {
    "model.name_or_path": True,
    "model.reference_path": True,
    "model.load_from": False,
    "sae.path": True,
    "data_dir": False,
    "compare_to": False,
    "config-path": False,
    "loss.trainer": False,
    "loss.feature_weights": False,
}
LISTS = ("datasets", "eval_datasets", "probe", "files")
FLAGS = ("-f", "--file", "--against", "--questions", "--references", "-p")
TOOLS = {
    "pip",
    "conda",
    "hf",
    ".",
    "python3.11",
    "accelerate",
    "transformers",
    "chromium",
    "rm",
    "scripts/check",
    "scripts/vllm_cpu",
}


def paths_of(command: Command) -> Iterator[tuple[str, bool]]:
    """The paths that a command reads, and whether each may be a place on the Hub."""
    for key, value in command.values.items():
        key = re.sub(r"^sae\.parts\.\w+\.", "sae.", key)
        if key in PATHS and not value.startswith("[") and (key != "loss.trainer" or ":" in value):
            yield value, PATHS[key]
        if key in LISTS:
            items = re.sub(r"\{name: (.*?), weight: .*?\}", r"\1", value).strip("[]").split(",")
            yield from ((item, False) for item in items if "/" in item or "." in item)
    if command.program == "compare.py":
        flag = ""
        for word in command.arguments:
            flag = word if word.startswith("-") else flag
            if flag in FLAGS and word != flag and ("/" in word or "." in word):
                yield word, False
    if command.words[0] == "cp":
        yield from ((word, False) for word in command.words[1:-1])
    if command.words[:2] == ["python", "-m"]:
        yield from ((word, False) for word in command.words[3:] if command.words[2] == "pytest" and "/" in word)
    elif command.words[0] == "python":
        yield command.words[1], False


def is_there(path: str, made: dict[str, str | None], hub: bool) -> bool:
    """Whether a path exists, or was made before, or is not ours to check: the reader's own, or a place on the Hub."""
    if path.startswith(("/", "$FPO_DATA")) or re.fullmatch(r"[A-Z_]+", path):
        return True
    plain = path.split("*")[0].rpartition(":")[0] or path.split("*")[0]
    if (REPO / plain).exists() or any(plain == known or plain.startswith(f"{known}/") for known in made):
        return True
    top, *rest = plain.split("/")
    return hub and bool(rest) and not (REPO / top).exists() and top not in ("outputs", "samples")


ALL = {
    f"{page}: {' '.join(command.words)}": command
    for page in DOCUMENTS
    if page != "CONTRIBUTING.md"  # its recipes are followed, below
    for command in commands(page)
}


@pytest.mark.parametrize("name", ALL)
def test_a_commands_program_and_paths_are_there(name):
    command = ALL[name]
    assert command.program.endswith((".py", ".sh")) or command.program in TOOLS | {"python", "cp", "mkdir"}
    missing = [path for path, hub in paths_of(command) if not is_there(path, command.made, hub)]
    assert missing == []


def of(program: str) -> list[str]:
    return [name for name, command in ALL.items() if command.program == program and command.arguments]


@pytest.mark.parametrize("name", of("train.py") + of("scripts/slurm.sh"))
def test_train_command_is_sound(name, tmp_path, monkeypatch):
    command = ALL[name]
    for directory in ("assets", "docs", "tests"):
        (tmp_path / directory).symlink_to(REPO / directory)
    for path, text in command.made.items():
        if text is not None or path.endswith(".jsonl"):
            (tmp_path / path).write_text(text or "")
    monkeypatch.chdir(tmp_path)
    if "$FPO_DATA" in name and not DATA.is_dir():
        pytest.skip(f"no real data in {DATA}")
    arguments = [argument.replace("$FPO_DATA", str(DATA)) for argument in command.arguments]
    if {"--help"} & set(arguments):
        return
    arguments = settings.translate_arguments(arguments)
    settings.check_overrides(arguments)
    settings.check_config(composed(arguments), modes=("train", "plan", "online"))


NEW = {"loss.trainer", "loss.price", "loss.latents"}  # of losses that the pages write
UNREAD = {"datasets", "eval_datasets", "data_dir", "model.name_or_path"}  # by a plan


def commands_for_cards() -> dict[str, tuple[DictConfig, int]]:
    """The train.py commands for models of the Hub: configuration and ranks, by the command."""
    known = {*settings.choices_of("model"), *plan.SHAPES["models"]} - {"tiny"}
    found = {}
    for name in of("train.py") + of("scripts/slurm.sh"):
        values = ALL[name].values
        if values.get("model") in known and values["loss"] != "sae" and not values.keys() & NEW:
            own = [word for word in ALL[name].arguments if word.lstrip("+").partition("=")[0] not in UNREAD]
            at = [word.partition("=/saes/") for word in own]
            own = [f"{key}={known_sae(values)}" if path else key for key, path, _ in at]
            nodes = 2 if "hybrid_sharding" in name or "slurm" in name else 1
            found[name] = composed(settings.translate_arguments(own)), 8 * nodes
    return found


def known_sae(values: dict[str, str]) -> str:
    """A public SAE that a command could have a local copy of: the one that it names, or one that fits its model."""
    if "sae" in values:
        return OmegaConf.load(REPO / f"config/sae/{values['sae']}.yaml").path
    source = OmegaConf.load(REPO / f"config/model/{values['model']}.yaml").name_or_path
    shape = plan.SHAPES["models"][source]
    return next(
        path
        for path, (width, _, layer, _) in plan.SHAPES["saes"].items()
        if width == shape["hidden_size"] and layer < shape["num_hidden_layers"]
    )


def test_train_commands_fit_cards_of_80_gb():
    """In 72 GB of each of eight, or of two nodes, which leaves room for what is not counted."""
    peaks = {name: plan_for_cards(*own).peak for name, own in commands_for_cards().items()}
    assert len(peaks) > 30
    assert {name: f"{peak / 1e9:.1f} GB" for name, peak in peaks.items() if peak > CARD} == {}


@pytest.mark.parametrize("name", of("eval.py"))
def test_eval_command_is_sound(name):
    path, *overrides = ALL[name].arguments
    if path != "--help":
        assert path.startswith("--config-path=")
        settings.check_overrides(settings.translate_arguments(overrides))


@pytest.mark.parametrize("name", of("compare.py"))
def test_compare_command_is_sound(name, monkeypatch):
    monkeypatch.setattr(compare, "load_template", lambda *_: None)
    monkeypatch.setattr(compare, "complete_settings", lambda *_: None)
    monkeypatch.setattr(compare, "compare", lambda *_: None)
    if "--help" not in name:
        compare.main(ALL[name].arguments)  # exits where it does not know a flag


# --------------------------------------------------------------------------------------------------- names and links


@pytest.mark.parametrize(("group", "page"), [("loss", "losses"), ("model", "models"), ("sae", "saes")])
def test_a_page_lists_what_can_be_chosen(group, page):
    there = {path.stem for path in (REPO / "config" / group).glob("*.yaml")} - {"base"}
    listed = set(re.findall(r"`([\w.-]+)`", DOCUMENTS[f"docs/{page}.md"]))
    assert there - listed == set()


def test_data_page_lists_every_data_set():
    listed = set(re.findall(r"`(\w+)`", DOCUMENTS["docs/data.md"]))
    assert set(dataloader.named_loaders()) - listed == set()


def test_losses_page_has_every_quantity_and_figure():
    listed = set(re.findall(r"`(\w+)`", DOCUMENTS["docs/losses.md"]))
    assert {*QUANTITIES, *report.FIGURE_NAMES} - listed == set()


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", DOCUMENTS[page])
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = (REPO / page).parent / target if target else REPO / page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked.read_text()), heading
    for picture in re.findall(r'<img src="([^"]*)"', text):
        assert ((REPO / page).parent / picture).exists(), picture


# ------------------------------------------------------------------------------------------------------------ sizes


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", DOCUMENTS)
def test_lines_fit_a_screen(page):
    """Tables may be wider."""
    assert [line for line in DOCUMENTS[page].splitlines() if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", FOR_USERS)
def test_pages_for_users_name_no_place_that_they_do_not_have(page):
    assert "../shared" not in DOCUMENTS[page]


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


def follow(section: str, folder: Path) -> None:
    """Write the files of a section and run its commands, in the order of its blocks."""
    for language, body in BLOCK.findall(section):
        if language == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                if program == "python":
                    run_command(*arguments, cwd=folder)
                else:
                    subprocess.run(["bash", "-euc", line], cwd=folder, check=True)
            continue
        first, _, rest = body.partition("\n")
        what = re.fullmatch(r"# (add to|new file) (\S+)", first)
        assert what, first
        path = folder / what[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        assert path.exists() == (what[1] == "add to")
        with path.open("a") as file:
            file.write(rest)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_works_as_written(recipe, copy):
    """And learns as it says: the held-out loss of each run at its end is a number of the text, within 5 %."""
    section = CONTRIBUTING.split(f"## {recipe}\n")[1].split("\n## ")[0]
    before = set((copy / "outputs").glob("*/summary.json"))
    follow(section, copy)
    told = [float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+", BLOCK.sub("", section))]
    runs = set((copy / "outputs").glob("*/summary.json")) - before
    assert runs
    for run in runs:
        loss = json.loads(run.read_text())["loss_after"]
        assert any(loss == pytest.approx(number, rel=0.05) for number in told), (run.parent.name, loss)


@pytest.mark.slow
def test_the_readmes_loss_learns_as_it_says(copy):
    section = README.split("**Add a loss in 8 lines**")[1].split("\n## ")[0]
    follow(section, copy)
    (code,) = [body for language, body in BLOCK.findall(section) if language == "python"]
    assert len([line for line in code.splitlines()[1:] if line]) <= 8
    figures = json.loads((copy / "outputs/hinge/summary.json").read_text())
    last = [json.loads(line) for line in (copy / "outputs/hinge/metrics.jsonl").read_text().splitlines()][-1]
    text = " ".join(section.split())
    told = re.search(r"loss falls from 1 to (.*), reward accuracy reaches (.*), and .* to ([\d.]+)\. ", text)
    assert told
    found = (figures["loss_after"], last["rewards_eval/accuracies"], figures["accuracy_after"])
    assert found == pytest.approx([float(number) for number in told.groups()], abs=0.03)


@pytest.mark.slow
def test_the_readmes_custom_trainer_runs_as_written(copy):
    (code,) = [body for language, body in BLOCK.findall(README) if "class CustomKTOTrainer" in body]
    (line,) = re.findall(r"`(python train\.py loss=unpaired [^`]*)`", README)
    (copy / "my_trainers.py").write_text(code)
    few = ["n_examples=64", "n_eval_examples=16"]
    run_command(*shlex.split(line)[1:], *few, cwd=copy)


# ------------------------------------------------------------------------------------------------------- the pictures


def test_the_picture_of_control_is_that_of_its_figures_which_are_the_tables():
    lines = [json.loads(line) for line in control.FIGURES.read_text().splitlines()]
    assert control.picture(lines) == control.PICTURE.read_text()
    drawn = re.findall(r'<circle cx="[\d.]+" cy="[\d.]+" r="3.5" fill="(#\w+)"', control.PICTURE.read_text())
    assert len(drawn) == len(lines) and len(set(drawn)) == 10  # as many colours as methods
    for pushed in control.PUSHED:
        table = DOCUMENTS["docs/control.md"].split(f"<!-- {pushed} -->\n")[1].split("<!-- end -->")[0]
        rows = [row.strip(" |").split(" | ") for row in table.strip().splitlines()[3:]]
        ends = {line["method"]: line for line in lines if (line["pushed"], line["pairs"]) == (pushed, control.PAIRS)}
        assert [row[0] for row in rows] == list(ends)
        assert [tuple(map(float, row[4:6])) for row in rows] == [(x["gained"], x["friendly"]) for x in ends.values()]


def test_prediction_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A line for each run; one that is there, or a trained one, is not made again."""
    monkeypatch.setattr(prediction, "FIGURES", tmp_path / "figures.jsonl")
    monkeypatch.setattr(prediction, "OUTPUT", tmp_path)
    case, done = prediction.Case(prediction.TOY, "kto", 160, seed=2), []
    outcome = {"effective": 0.5, "fits": [{"name": "drawn", "r2": [0.7, 0.1], "ceiling": 0.9, "rank": [0.4, 0.1]}]}

    def command(script, *_arguments):
        done.append(script)
        if script == "train.py":
            (case.folder / "LATEST").mkdir(parents=True)
            return
        (table := case.folder / "data_features/toy/data_features.parquet").parent.mkdir(parents=True)
        about = {"data_features": json.dumps({"outcome": outcome})}
        pq.write_table(pa.table({"z": [1.0]}).replace_schema_metadata(about), table)

    monkeypatch.setattr(prediction, "command", command)
    found = [prediction.run(case) for _ in range(2)]
    assert found[0] == found[1] == case.key | outcome and done == ["train.py", "eval.py"]
    assert prediction.FIGURES.read_text().count("\n") == 1
    cells, page = prediction.row(case, found), DOCUMENTS["docs/features.md"]
    assert cells[:5] == ["toy", "`kto`", "160", "0.70 (0.70 to 0.70)", "0.90 (0.90 to 0.90)"]
    again = prediction.with_row(page, cells)
    changed = [(a, b) for a, b in zip(page.splitlines(), again.splitlines(), strict=True) if a != b]
    assert len(changed) == 1 and changed[0][1] == f"| {' | '.join(cells)} |"
    more = prediction.with_row(again, ["smollm2", *cells[1:]])
    assert more.count("<!-- end -->") == page.count("<!-- end -->") and "| smollm2 | `kto` |" in more
