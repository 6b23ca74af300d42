"""Metrics: averaged over steps, written to metrics.jsonl and to trackers, shown on the terminal."""

import importlib.util
import netrc
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from distributed import parallel
from training.checkpoint import LOG, Run
from training.settings import TrainingSettings
from utils import SIDES, UserError, console, open_in_place, write_json_lines, write_text

SECONDS_BETWEEN_LINES = 30.0


class MetricName(NamedTuple):
    """What a metric's name says: `sae_eval/layer_2/l0` is ("sae", "eval", ("layer_2", "l0"))."""

    group: str
    split: str | None  # "train" or "eval"; None for what belongs to no data, such as lr
    parts: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> "MetricName":
        found = re.fullmatch(r"(\w+?)[_/](train|eval)((?:/.+)?)", name)
        return cls(found[1], found[2], tuple(filter(None, found[3].split("/")))) if found else cls(name, None, ())


def of_data_set(name: str, data_set: str) -> str:
    """The name of an evaluation's metric on one of several data sets: `rewards_eval/hh/margins`, `loss/eval/hh`."""
    return re.sub(r"([_/]eval)(?=/|$)", rf"\1/{data_set}", name, count=1)


def by_data_set(values: dict[str, float], names: Iterable[str]) -> dict[str | None, dict[str, float]]:
    """Metrics on all data, by None, and on each data set, by its name and under the metric's plain name."""
    found: dict[str | None, dict[str, float]] = {None: dict(values)}
    for name in names:
        own = {key: found[None].pop(whole) for key in values if (whole := of_data_set(key, name)) in found[None]}
        found |= {name: own} if own else {}
    return found


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` for less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class MetricAccumulator:
    """Weighted means of metrics. They are summed on the device, and read once, over all ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, float]] = {}

    def add(self, name: str, values: Tensor, weight: float | None = None) -> None:
        """Add values of any shape; `weight` is what they count for, their number if not given."""
        total, count = self.sums.get(name, (torch.zeros((), device=values.device), 0.0))
        self.sums[name] = (
            total + values.detach().float().sum(),
            count + (values.numel() if weight is None else weight),
        )

    @classmethod
    def together(cls, parts: Iterable["MetricAccumulator"]) -> "MetricAccumulator":
        """Of all that was added to some others."""
        found = cls()
        for name, (total, count) in (item for part in parts for item in part.sums.items()):
            found.add(name, total, count)
        return found

    def read(self) -> dict[str, float]:
        """The means. Every rank has to ask, and to have added the same names."""
        if not self.sums:
            return {}
        sums = torch.stack([total for total, _ in self.sums.values()]).double().cpu()
        counts = torch.tensor([count for _, count in self.sums.values()], dtype=torch.float64)
        sums, counts = parallel.sum_over_ranks(torch.stack([sums, counts]))
        values = zip(self.sums, sums.tolist(), counts.tolist())
        return {name: total / count for name, total, count in values if count}


# ---------------------------------------------------------------------------------------------------- the terminal


class StepLines:
    """A line of figures on the terminal, or in a batch job's log: of the first step, then at most every 30 seconds,
    and of the last step. Each shows the means since the line before it, and the time that is left.

    `headline` makes the text of the metrics, such as "loss 0.52".
    """

    def __init__(self, total: int, done: int, headline: Callable[[dict[str, float]], str]) -> None:
        self.total, self.start, self.headline = total, done, headline
        self.began, self.due = time.monotonic(), 0.0
        self.since: list[dict[str, float]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        """Note the metrics that were logged after `step` steps, and print a line where one is due."""
        self.since.append(values)
        now = time.monotonic()
        if now < self.due and step < self.total:
            return
        seconds = sum(line["seconds"] for line in self.since)
        speed = sum(line["tokens_per_second"] * line["seconds"] for line in self.since) / max(seconds, 1e-9)
        left = (now - self.began) / (step - self.start) * (self.total - step)
        means = {name: fmean(line[name] for line in self.since if name in line) for name in values}
        parts = [
            f"step {step:,}/{self.total:,}",
            self.headline(means),
            f"lr {values['lr']:.3g}",
            f"{speed:,.0f} tokens/s",
            *([f"{clock(left)} left"] if step < self.total else []),
        ]
        console.print("  ".join(parts), markup=False)
        self.since, self.due = [], now + SECONDS_BETWEEN_LINES


def evaluation_table(step: int, examples: int, values: dict[str, float], data_set: str | None = None) -> Table:
    """The metrics of an evaluation; those of chosen and rejected completions, or of several layers, side by side."""
    rows: dict[str, dict[str, float]] = {}
    columns = [""]
    for name, value in values.items():
        group, _, parts = MetricName.of(name)
        column = parts[-1] if parts and parts[-1] in SIDES else parts[0] if len(parts) > 1 else ""
        row = "/".join([group, *(part for part in parts if part != column)])
        rows.setdefault(row, {})[column] = value
        columns += [column] if column not in columns else []
    data = "held-out data" if data_set is None else data_set
    title = f"{data} after {step:,} steps ({examples:,} examples)"
    table = Table("", title=title, title_justify="left", title_style="bold", box=None, show_header=len(columns) > 1)
    for column in columns:
        table.add_column(column, justify="right", min_width=8)
    for row, figures in rows.items():
        table.add_row(row, *(f"{figures[column]:.4g}" if column in figures else "" for column in columns))
    return table


# ---------------------------------------------------------------------------------------------------- files, trackers


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, and the trackers that `log_to` names.

    A run resumed after `step` steps begins with what the file held then: lines that the killed one wrote later go, and
    a file that was moved or changed since is made again.
    """

    def __init__(self, run: Run, config: TrainingSettings, step: int) -> None:
        self.path, self.file, self.trackers = run.folder / LOG, None, []
        if parallel.rank() == 0:
            before = run.saved_log()
            if not run.log_is_sound():
                if before:
                    console.print(f"{self.path} is not as the run wrote it: made again", style="yellow", markup=False)
                write_text(self.path, before.decode())
            self.file = open_in_place(self.path)
            self.file.truncate(len(before))
            self.trackers = [TRACKERS[name](run, config, step) for name in config.log_to]

    def write(self, values: dict[str, Any]) -> None:
        """On rank 0; the others have nothing to write."""
        if self.file is None:
            return
        write_json_lines(self.file, values)
        for tracker in self.trackers:
            tracker.log(values, step=values["step"])

    def content(self) -> bytes:
        """All that was written; on the other ranks nothing."""
        return self.path.read_bytes() if self.file is not None else b""

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        while self.trackers:
            self.trackers.pop().finish()


class TensorBoard:
    """Event files in `<run>/tensorboard/`, for `tensorboard --logdir`, with the methods of a wandb run."""

    def __init__(self, run: Run, config: TrainingSettings, step: int) -> None:  # noqa: ARG002
        from torch.utils.tensorboard import SummaryWriter  # an extra

        # Of the steps that a killed run logged after its last state, the viewer shows only the new ones.
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1 if step else 0)
        self.writer.add_text("config", f"```yaml\n{(run.folder / 'config.yaml').read_text()}\n```")

    def log(self, values: dict[str, Any], step: int) -> None:
        for name in values.keys() - {"step"}:
            self.writer.add_scalar(name, values[name], step)

    def finish(self) -> None:
        self.writer.close()


def start_wandb(run: Run, config: TrainingSettings, step: int) -> Any:  # noqa: ARG001
    """A wandb run, the same one after each resumption. It never asks for a login: without a key it is kept offline, in
    the run directory."""
    import wandb  # a second to import, so only where it is used

    try:
        has_key = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        has_key = False
    default = "online" if has_key or os.environ.get("WANDB_API_KEY") else "offline"
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.exp_name,
        id=run.id(),
        resume="allow",
        dir=run.folder,
        mode=os.environ.get("WANDB_MODE", default),  # type: ignore[arg-type]
        config=config.model_dump(),
        settings=wandb.Settings(silent=True),
    )


TRACKERS: dict[str, Callable[[Run, TrainingSettings, int], Any]] = {"tensorboard": TensorBoard, "wandb": start_wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package, of the same name, is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log_to=[{name}] needs the package {name}: pip install {name}")
