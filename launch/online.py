"""Rounds of training on a policy's own samples: `python train.py experiment=online`.

A reward model is trained on preference data. In each round the policy answers prompts, the reward model labels the
answers, and the policy is trained on the pairs. Every step is one of this repo's commands, which finds what it has done
before: after a kill the same command goes on. All is in `<cache_dir>/<exp_name>/`: the run `reward`, the runs
`round-1`, `round-2`, ..., each of which names its parent in `model.load_from`, `samples/`, `data/` and `rounds.json`.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

import models
from distributed import parallel
from launch.schema import READ, Config
from launch.settings import find_paths
from training.quantities import Binding
from utils import REPO, UserError, console, write_json, written

OWN = ("experiment", "mode", "exp_name", "cache_dir", "datasets", "resume")  # arguments that each step has its own of


@dataclass(frozen=True)
class Rounds:
    """Where the rounds are, and the commands of one."""

    config: Config

    @property
    def home(self) -> Path:
        return Path(self.config.cache_dir) / self.config.exp_name

    def policy(self, number: int) -> list[str]:
        """The policy after so many rounds, as eval.py takes it."""
        if number:
            return [f"--config-path={self.home / f'round-{number}'}"]
        start = models.fetch(self.config.model.name_or_path, models.CONFIG_FILES, "model.name_or_path")
        weights = self.config.model.load_from
        return [f"--config-path={start}", *([f"++model.load_from={weights}"] if weights else [])]

    def train(self, name: str, *arguments: str) -> None:
        do("train.py", *arguments, f"exp_name={name}", f"cache_dir={self.home}")

    def sample(self, number: int, name: str, *arguments: str) -> Path:
        """Samples of the policy after so many rounds; gives their file."""
        folder = self.home / "samples"
        own = [f"++datasets={written(self.config.datasets)}", f"++exp_name={name}", f"++samples_dir={folder}"]
        own += [f"++{key}={getattr(self.config, key)}" for key in ("seed", "max_new_tokens", "backend")]
        do("eval.py", *self.policy(number), *own, "++temperature=1", f"++cache_dir={self.home}", *arguments)
        return folder / f"{name}.json"


def is_of_training(key: str) -> bool:
    """Whether the training of a round reads a key, too."""
    return key.partition(".")[0] not in READ["online"] - READ["train"]


def do(program: str, *arguments: str) -> None:
    """Run one of this repo's commands. Ends this one, with its status, where it fails.

    Signals are passed on to it, so that a run saves its state and stops.
    """
    console.print(f"\npython {program} {' '.join(arguments)}", markup=False, highlight=False)
    command = [sys.executable, str(REPO / program), *arguments]
    step = subprocess.Popen(command, process_group=0, preexec_fn=parallel.end_with_parent)
    with parallel.passing_on_signals([step]):
        status = step.wait()
    if status:
        sys.exit(status if status > 0 else 128 - status)


def run(config: Config, binding: Binding, arguments: Sequence[str]) -> None:
    """All rounds, and a table of them. Raises UserError for what no step could do."""
    if config.resume == "never":
        raise UserError(f"resume=never: to begin again, remove {Path(config.cache_dir) / config.exp_name}")
    if config.backend == "openai":
        raise UserError("backend=openai: a server has one policy, and each round has its own; transformers or vllm")
    find_paths(config, binding.needs)
    given = [own for own in arguments if (key := own.lstrip("+").partition("=")[0]) not in OWN and is_of_training(key)]
    rounds, own = Rounds(config), config.online
    data = f"datasets={written(config.datasets)}"
    rounds.train("reward", "loss=bradley-terry", f"model={config.model.name}", data, *own.reward)
    lines = [measure(rounds, 0)]
    for number in range(1, own.rounds + 1):
        drawn = ["++eval_split=train", f"++n_samples={own.prompts}", f"++samples={own.samples}"]
        answers = rounds.sample(number - 1, f"round-{number}", *drawn)
        pairs = rounds.home / "data" / f"round-{number}.jsonl"
        label = ["++mode=label", f"++files=[{answers}]", f"++labels={pairs}", f"++seed={config.seed}"]
        do("eval.py", f"--config-path={rounds.home / 'reward'}", *label)
        parent = [f"++model.load_from={rounds.home / f'round-{number - 1}'}"] if number > 1 else []
        sets = [f"datasets=[{pairs}]", f"eval_datasets={written(config.datasets)}"]
        rounds.train(f"round-{number}", "experiment=online", *given, "mode=train", *sets, *parent)
        lines.append({"pairs": sum(1 for _ in pairs.open())} | measure(rounds, number))
        write_json(rounds.home / "rounds.json", lines)
        console.print(table(lines))


def measure(rounds: Rounds, number: int) -> dict[str, Any]:
    """The reward, and for toy data the true score, of answers to held-out prompts; after a round also the KL to the
    first start, and the drift of the SAE's features from it."""
    answers = rounds.sample(number, f"test-{number}", f"++n_samples={rounds.config.n_samples}")
    where = [f"++samples_dir={answers.parent}", f"++exp_name=test-{number}"]
    do("eval.py", f"--config-path={rounds.home / 'reward'}", "++mode=rewards", f"++files=[{answers}]", *where)
    (curve,) = json.loads((answers.parent / f"test-{number}-rewards.json").read_text())["best_of_n"].values()
    found = {"round": number, **curve["curve"][0]}
    if number:
        start = rounds.policy(0)[0].partition("=")[2]
        run = rounds.home / f"round-{number}"
        do("eval.py", f"--config-path={run}", "++mode=eval", f"++model.reference_path={start}")
        figures = json.loads((run / "eval.json").read_text())
        drift = [value for name, value in figures.items() if name.startswith("feature_drift_eval/")]
        found |= {"kl": figures["samples/kl"], **({"drift": fmean(drift)} if drift else {})}
    return found


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """The rounds side by side."""
    shown = Table("round", "pairs", "reward", "true score", "KL to the start", "drift")
    for line in lines:
        figures = [line.get(name) for name in ("reward", "true_score", "kl", "drift")]
        written_out = ["" if figure is None else f"{figure:.3f}" for figure in figures]
        shown.add_row(str(line["round"]), str(line.get("pairs", "")), *written_out)
    return shown
