"""The run directory `<cache_dir>/<exp_name>/` and what is written in it.

    config.yaml       the whole configuration, resolved
    metrics.jsonl     one line for each logged step and evaluation
    step-<examples>/  policy.pt as HALOs writes it, and the same weights in Hub format
    LATEST            a link to the newest of those
    state/step-<n>/   what a resumed run needs: weights, optimiser, place in the data

Every directory appears whole or not at all. No file here holds a pickle that has to be trusted: safetensors, JSON,
and a policy.pt of plain tensors that `torch.load(weights_only=True)` reads.
"""

import fcntl
import json
import netrc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from utils import UserError, appears_whole, flush_to_disk, write_text

# All that a run leaves in its directory, and so all that starting over removes.
OWN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "LATEST", "step-*", "state", "wandb")

# Keys that may differ between a run and its resumption: none of them changes a step that is still to come.
MAY_CHANGE = (
    "resume",
    "mode",
    "cache_dir",
    "wandb",
    "do_first_eval",
    "eval_every",
    "n_eval_examples",
    "save_every",
    "log_every",
    "intermediate_checkpoints",
    "keep_states",
    "toy_comparison",
)


class Run:
    """A run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states = folder / "state"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make the directory, and keep other processes from writing to it.

        Raises UserError where another one does, or where this one may not.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error}); cache_dir= names another place") from error
        with lock:  # closing it, or the end of the process, unlocks it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{self.folder}: another process is writing to this run; use another exp_name"
                raise UserError(message) from error
            for part in self.folder.rglob(".*.part"):  # left by a process that was killed while it wrote
                shutil.rmtree(part)
            yield

    def start(self, config: DictConfig) -> None:
        """Write the configuration, and with `resume: never` remove what the run of this name left.

        Raises UserError where the run there was started with another configuration.
        """
        if config.resume == "never":
            for path in [found for pattern in OWN_FILES for found in self.folder.glob(pattern)]:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self.newest_state() is not None:
            differing = differences(OmegaConf.load(self.folder / "config.yaml"), config)
            if differing:
                raise UserError(
                    f"{self.folder} holds a run with another configuration:\n"
                    + "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())
                    + "\nUse another exp_name, or resume=never to start over and replace it."
                )
        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))

    def newest_state(self) -> Path | None:
        return max(self.states.glob("step-*"), default=None)

    def save_state(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, place: dict[str, Any]) -> None:
        """Keep all that continuing needs: the weights, the optimiser, the random state and `place` (JSON values)."""
        packed = optimizer.state_dict()
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, values in packed["state"].items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        tensors["random_state"] = torch.get_rng_state()
        with appears_whole(self.states / f"step-{step:09d}") as part:
            part.mkdir()
            safetensors.torch.save_model(module, str(part / "model.safetensors"))
            safetensors.torch.save_file(tensors, part / "optimizer.safetensors")
            groups = packed["param_groups"]
            (part / "trainer.json").write_text(json.dumps({"step": step, "param_groups": groups, **place}))

    def load_state(self, folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put the state back; gives what was passed to `save_state` as `place`, and the step."""
        place = json.loads((folder / "trainer.json").read_text())
        safetensors.torch.load_model(module, str(folder / "model.safetensors"))
        tensors = safetensors.torch.load_file(folder / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("random_state"))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": place.pop("param_groups")})
        return place

    def prune_states(self, keep: int) -> None:
        """Remove all but the newest `keep` states."""
        for old in sorted(self.states.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def export(self, examples: int, write: Callable[[Path], None], *, keep_others: bool) -> Path:
        """Let `write` fill `step-<examples>/`, then point LATEST there in one step.

        Earlier exports go afterwards unless they are kept.
        """
        target = self.folder / f"step-{examples}"
        if not target.exists():  # else it was written, whole, by a run killed since, at this very step
            with appears_whole(target) as part:
                part.mkdir()
                write(part)
        link = self.folder / ".LATEST.new"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.rename(self.folder / "LATEST")
        flush_to_disk(self.folder)
        if not keep_others:
            for other in self.folder.glob("step-*"):
                if other != target:
                    shutil.rmtree(other)
        return target


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, and wandb where it is enabled.

    `size` goes into each state, so that a resumed run cuts off what the killed one wrote after it.
    """

    def __init__(self, run: Run, config: DictConfig, size: int) -> None:
        path = run.folder / "metrics.jsonl"
        self.file = path.open("a")
        os.truncate(path, size)
        self.file.seek(size)
        self.wandb = start_wandb(run, config) if config.wandb.enabled else None

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=values["step"])

    @property
    def size(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(run: Run, config: DictConfig) -> Any:
    """A wandb run. It never asks for a login: without a key it is kept offline, in the run directory."""
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
        dir=run.folder,
        mode=os.environ.get("WANDB_MODE", default),  # type: ignore[arg-type]
        config=OmegaConf.to_container(config, resolve=True),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True),
    )


def differences(old: Any, new: DictConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, of those that may not change between a run and its resumption."""
    a, b = flat(OmegaConf.to_container(old, resolve=True)), flat(OmegaConf.to_container(new, resolve=True))
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key.split(".")[0] not in MAY_CHANGE
    }


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else key).items()}
