"""The run directory `<cache_dir>/<exp_name>/` and what is written in it.

    config.yaml       the whole configuration, resolved
    metrics.jsonl     one line for each logged step and evaluation
    report.html       the run page, made from the other files (launch/report.py)
    step-<examples>/  policy.pt as HALOs writes it, and the same weights in Hub format
    LATEST            a link to the newest of those
    state/step-<n>/   what a resumed run needs: weights, optimiser, place in the data

Every directory appears whole or not at all. No file here holds a pickle that has to be trusted: safetensors, JSON,
and a policy.pt of plain tensors that `torch.load(weights_only=True)` reads.
"""

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from distributed import parallel
from distributed.sharding import reshard
from training.settings import TrainingSettings
from utils import UserError, console, file_digest, flat, flush_to_disk, write_text

# All that a run leaves in its directory, and so all that starting over removes.
OWN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "completions.json",
    "report.html",
    "LATEST",
    "step-*",
    "state",
    "tensorboard",
    "wandb",
    "features",
)

# Keys that may differ between a run and its resumption: none of them changes a step that is still to come.
MAY_CHANGE = (
    "resume",
    "mode",
    "cache_dir",
    "nproc",
    "log_to",
    "wandb",
    "do_first_eval",
    "eval_every",
    "n_eval_examples",
    "save_every",
    "log_every",
    "intermediate_checkpoints",
    "keep_checkpoints",
    "toy_comparison",
)


class Run:
    """A run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states = folder / "state"
        self.pending: Future[Any] | None = None  # the state being written, by another thread
        self.group: dist.ProcessGroup | None = None  # of its own, for that thread

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make the directory, and keep other processes from writing to it until nothing more is written here.

        Raises UserError where another one does, or where this one may not.
        """
        held: list[Any] = []
        parallel.from_rank_zero(lambda: held.append(self.lock()))
        with contextlib.ExitStack() as stack:
            for lock in held:
                stack.enter_context(lock)
            stack.callback(lambda: self.pending and self.pending.exception())  # where training ended in an error
            yield

    def lock(self) -> Any:
        """The lock on the directory: an open file; closing it, or the end of the process, unlocks."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error}); cache_dir= names another place") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{self.folder}: another process is writing to this run; use another exp_name"
            raise UserError(message) from error
        for part in self.folder.rglob(".*.part"):  # left by a process that was killed while it wrote
            shutil.rmtree(part)
        return lock

    def start(self, config: TrainingSettings, saved: TrainingSettings | None) -> None:
        """On rank 0: write the configuration, and with `resume: never` remove what the run of this name left.

        `saved` is the configuration that the run there was started with, if there is one. Raises UserError where it
        differs in something that changes the steps to come.
        """
        if config.resume == "never":
            for path in [found for pattern in OWN_FILES for found in self.folder.glob(pattern)]:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self.saved():
            differing = {} if saved is None else differences(saved, config)
            if differing:
                raise UserError(
                    f"{self.folder} holds a run with another configuration:\n"
                    + "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())
                    + "\nUse another exp_name, or resume=never to start over and replace it."
                )
        write_text(
            self.folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
        )

    def saved(self) -> list[Path]:
        """The states on disk, the newest first."""
        return sorted(self.states.glob("step-*"), reverse=True)

    def newest_state(self) -> Path | None:
        """The newest state that is what was written; damaged ones after it are named and removed. For all ranks to
        call.

        Raises UserError where there are states and all are damaged.
        """
        states = parallel.from_rank_zero(self.saved)
        for number, folder in enumerate(states):
            damage = damaged_files(folder)
            if not parallel.sum_over_ranks(torch.tensor(len(damage))):
                if parallel.rank() == 0:
                    for damaged in states[:number]:
                        shutil.rmtree(damaged)
                return folder
            console.print(f"{folder} is damaged and passed over ({', '.join(damage)})", style="yellow", markup=False)
        if states:
            raise UserError(f"{self.states}: every state there is damaged; resume=never starts over")
        return None

    def save_state(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, place: dict[str, Any], *, keep: int
    ) -> None:
        """Keep all that continuing needs: what is trained, the optimiser, the random state and `place` (JSON values
        with the `step`). The newest `keep` states stay.

        Every rank copies its part, and another thread writes the copies while training goes on.
        """
        self.finish_saving()
        if dist.is_initialized() and self.group is None:
            self.group = dist.new_group(backend="gloo")
        target = self.states / f"step-{place['step']:09d}"
        part = parallel.from_rank_zero(lambda: new_part(target))
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        tensors = trained_tensors(module) | own_buffers(module) | optimizer_tensors(module, optimizer)
        tensors["random_state"] = torch.get_rng_state()
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        assert isinstance(written, Future)
        groups = optimizer.state_dict()["param_groups"]
        place = {**place, "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in groups]}
        if parallel.rank() == 0:
            pool = ThreadPoolExecutor(1)
            self.pending = pool.submit(self.complete, written, part, target, place, keep)
            pool.shutdown(wait=False)  # not `with`, which would wait
        else:
            self.pending = written

    @staticmethod
    def complete(written: "Future[Any]", part: Path, target: Path, place: dict[str, Any], keep: int) -> None:
        """Finish a state once every rank has written its part: add the rest, rename it, and remove older states."""
        try:
            written.result()
            files = {path.name: file_digest(path) for path in sorted(part.iterdir())}
            (part / PLACE).write_text(json.dumps({**place, "files": files}))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        end_part(part, target, None)
        for old in sorted(target.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def finish_saving(self) -> None:
        """Wait until the last state is written. For all ranks to call.

        Raises UserError, on each, if it could not be; earlier states are as they were.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        error = pending.exception()
        if parallel.sum_over_ranks(torch.tensor(int(error is not None))):
            reason = "; ".join(map(str, root_causes(error))) if error else "another rank says why"
            good = next(iter(self.saved()), "none")
            raise UserError(f"{self.states}: cannot write the state ({reason}). The last good one: {good}") from error

    def load_state(self, folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put a state back, whatever number of ranks wrote it; gives what was passed to `save_state` as `place`."""
        place = json.loads((folder / PLACE).read_text())
        reader = HuggingFaceStorageReader(str(folder))
        found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        sizes = {name: tensor.size for name, tensor in found.items()}
        trained, buffers = trained_tensors(module), own_buffers(module)
        random_state = torch.zeros(sizes.pop("random_state"), dtype=torch.uint8)
        rest = sizes.keys() - trained.keys() - buffers.keys()
        optimiser = {name: like(trained, name, sizes[name]) for name in rest}
        dcp.load({**trained, **buffers, **optimiser, "random_state": random_state}, storage_reader=reader)
        torch.set_rng_state(random_state)
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(trained)}
        for name, tensor in optimiser.items():
            owner, slot = owner_and_slot(name)
            state.setdefault(numbers[owner], {})[slot] = tensor
        groups = [{**group, "params": list(range(len(trained)))} for group in place.pop("param_groups")]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return place

    def export(self, examples: int, write: Callable[[Path], None], *, keep_others: bool) -> Path:
        """Let `write` fill `step-<examples>/`, then point LATEST there in one step.

        Earlier exports go afterwards unless they are kept.
        """
        target = self.folder / f"step-{examples}"
        part = parallel.from_rank_zero(lambda: None if target.exists() else new_part(target))
        if part is not None:  # else it was written, whole, by a run killed since, at this very step
            failure = None
            try:
                write(part)
            except OSError as error:
                failure = error
            parallel.from_rank_zero(lambda: end_part(part, target, failure))
        parallel.from_rank_zero(lambda: self.point_at(target, keep_others=keep_others))
        return target

    def point_at(self, target: Path, *, keep_others: bool) -> None:
        link = self.folder / ".LATEST.new"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.rename(self.folder / "LATEST")
        flush_to_disk(self.folder)
        if not keep_others:
            for other in self.folder.glob("step-*"):
                if other != target:
                    shutil.rmtree(other)


def new_part(target: Path) -> Path:
    """A directory beside the target, to be filled and then renamed. Raises UserError where there can be none."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target.parent}: cannot write there ({error})") from error


def end_part(part: Path, target: Path, failure: OSError | None) -> None:
    """Let a filled directory appear under its name; or remove it, and raise UserError, if it could not be filled."""
    try:
        if failure is not None:
            raise failure
        flush_to_disk(*part.rglob("*"), part)
        part.rename(target)
        flush_to_disk(target.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error}); what was there before is as it was") from error


PLACE = "trainer.json"  # of a state: where the run stood, and the digests of the other files


def damaged_files(folder: Path) -> list[str]:
    """The damaged files of a state, among this rank's share of its files."""
    try:
        files = json.loads((folder / PLACE).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return [PLACE]
    own = list(files.items())[parallel.rank() :: parallel.world_size()]
    return [name for name, digest in own if not (folder / name).is_file() or file_digest(folder / name) != digest]


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, as this rank's slices; writing to them changes the module."""
    reshard(module)
    return {f"model.{name}": p.detach() for name, p in module.named_parameters() if p.requires_grad}


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """What else the module's state holds, such as running means."""
    kept = module.state_dict(keep_vars=True)
    return {f"buffer.{name}": buffer for name, buffer in module.named_buffers() if name in kept}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps for each trained parameter: `optimizer.<slot>:<name of the parameter>`."""
    named = dict(enumerate(trained_tensors(module)))
    return {
        f"optimizer.{slot}:{named[number]}": value
        for number, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def owner_and_slot(name: str) -> tuple[str, str]:
    slot, _, owner = name.removeprefix("optimizer.").partition(":")
    return owner, slot


def like(trained: dict[str, Tensor], name: str, size: torch.Size) -> Tensor:
    """Where a tensor of the optimiser is read to: split as its parameter is, if it has that shape."""
    parameter = trained[owner_and_slot(name)[0]]
    return torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)


def root_causes(error: BaseException) -> list[BaseException]:
    """What stands behind a checkpoint's failure, on each rank where it failed."""
    failures = getattr(error, "failures", None)
    if not failures:
        return [error]
    return [cause for cause, _ in failures.values()]


def differences(old: TrainingSettings, new: TrainingSettings) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, of those that may not change between a run and its resumption."""
    a, b = flat(old.model_dump()), flat(new.model_dump())
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key.split(".")[0] not in MAY_CHANGE
    }
