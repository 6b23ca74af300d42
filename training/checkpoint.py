"""The run directory `<cache_dir>/<exp_name>/` and what is written in it.

    manifest.json     the run's id, and the names of all that it writes here
    config.yaml       the whole configuration, resolved
    metrics.jsonl     one line for each logged step and evaluation
    report.html       the run page, made from the other files (launch/report.py)
    step-<examples>/  the weights: policy.pt as HALOs writes it, the Hub's format, or both
    LATEST            a link to the newest of those
    BEST              with eval_best, a link to the best of those
    state/step-<n>/   what a resumed run needs: weights, optimiser, place in the data, the log so far

Every directory appears whole or not at all, and with the digests of its files. No file here holds a pickle that has to
be trusted: safetensors, JSON, and a policy.pt of plain tensors that `torch.load(weights_only=True)` reads.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.storage import WriteResult

from distributed import parallel
from distributed.sharding import reshard
from modeling.tensor_files import write_safetensors
from training.settings import TrainingSettings
from utils import (
    Part,
    UserError,
    console,
    damaged_files,
    file_digest,
    flush_to_disk,
    in_words,
    is_file_name,
    lock,
    missing_folders,
    open_in_place,
    remove_empty,
    remove_litter,
    seal,
    write_json,
    write_text,
)

MANIFEST = "manifest.json"
# What a run writes, beside its exports; the state comes last, so that it is the last to be removed.
FILES = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "completions.json",
    "report.html",
    "eval.json",
    "features",
    "tensorboard",
    "wandb",
    "LATEST",
    "BEST",
    "state",
)
LINKS = ("LATEST", "BEST")  # to exports
DIRECTORIES = ("features", "tensorboard", "wandb", "state")
EXPORT = re.compile(r"step-\d+")
STATE = re.compile(r"step-\d{9}")  # any other name there is somebody's copy
PLACE = "trainer.json"  # of a state: where the run stood
LOG = "metrics.jsonl"  # of the run, and of a state: as it was then


class Run:
    """A run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states = folder / "state"
        self.made: list[Path] = []  # directories that were not there before, the inner first
        self.state: Path | None = None  # that the run goes on from,
        self.place: dict[str, Any] = {}  # and where it stood
        self.inputs: dict[str, str] = {}  # digests of all that it is trained from
        self.pending: Future[Any] | None = None  # the state being written, by another thread,
        self.read: Future[Any] | None = None  # and this rank's part of that: done when all tensors are in a file
        self.group: dist.ProcessGroup | None = None  # of its own, for that thread

    # ------------------------------------------------------------------------------------------------ whose it is

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
                stack.callback(self.remove_if_empty)
            stack.callback(lambda: self.pending and self.pending.exception())  # where training ended in an error
            yield

    def lock(self) -> IO[bytes]:
        """The lock on the directory: an open file; closing it, or the end of the process, unlocks."""
        path = self.folder / ".lock"
        try:
            while True:  # until it is there when it is locked: the other process may have removed it
                self.made = missing_folders(self.folder)
                self.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    held = open_in_place(path)
                    lock(held, self.folder, wait=False)
                    if os.path.samestat(path.stat(), os.fstat(held.fileno())):
                        break
        except BlockingIOError as error:
            message = f"{self.folder}: another process is writing to this run; use another exp_name"
            raise UserError(message) from error
        except OSError as error:
            where = "cache_dir= names another place"
            raise UserError(f"cannot write to {self.folder} ({in_words(error)}); {where}") from error
        for folder in (self.folder, self.states, self.folder / "features"):
            remove_litter(folder)
        return held

    def remove_if_empty(self) -> None:
        """Remove the directories that were made for a run of which nothing came."""
        if self.made and [path.name for path in self.folder.iterdir()] == [".lock"]:
            (self.folder / ".lock").unlink()
            remove_empty(self.made)

    def manifest(self) -> dict[str, Any] | None:
        """The run's `id` and its `files`: names in the directory. None where there is no run.

        Raises UserError where it cannot be read, or names something outside the directory.
        """
        path = self.folder / MANIFEST
        try:
            known = json.loads(path.read_text())
            if all(map(is_file_name, [known["id"], *known["files"]])):
                return dict(known)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{path}: does not list the files of a run; move {self.folder} away, or use another exp_name")

    def require_own(self) -> None:
        """On rank 0: raises UserError where files of other origin have the names that a run gives, and inside of what
        another run writes."""
        for inner, outer in itertools.pairwise((self.folder, *self.folder.parents)):
            if (inner.name in FILES or EXPORT.fullmatch(inner.name)) and (outer / MANIFEST).is_file():
                raise UserError(f"{self.folder}: {inner} belongs to the run {outer}; use another exp_name")
        if self.manifest() is not None:
            return
        there = sorted(path.name for path in self.folder.iterdir())
        taken = [name for name in there if name in FILES or EXPORT.fullmatch(name)]
        if taken:
            raise UserError(
                f"{self.folder} holds {', '.join(taken)}, and no {MANIFEST} that says that a run wrote them. "
                "Use another exp_name, or move them"
            )

    def list_export(self, name: str) -> None:
        """On rank 0: enter an export into the manifest, before it is written."""
        known = self.manifest() or {"id": secrets.token_hex(4), "files": [*FILES]}
        if name not in known["files"]:
            write_json(self.folder / MANIFEST, {**known, "files": [name, *known["files"]]})

    def id(self) -> str:
        """What trackers know the run by, until `resume=never` makes it another one."""
        known = self.manifest()
        assert known is not None
        return str(known["id"])

    def remove(self, names: list[str]) -> None:
        """Remove files and directories of the run, where they are there, each in one step."""
        removed = Part(self.folder / "removed")
        removed.path.mkdir()
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).rename(removed.path / name)
        removed.close()

    # ------------------------------------------------------------------------------------------------ its beginning

    def require_places(self, config: TrainingSettings) -> None:
        """On rank 0: raises UserError where there is a directory in the place of a file, as of LATEST after a copy
        without links. With `resume: never` it will go."""
        for path in [self.folder / name for name in FILES if name not in DIRECTORIES and config.resume != "never"]:
            if path.is_dir() and not path.is_symlink():
                what = "link" if path.name == "LATEST" else "file"
                raise UserError(f"{path} is a directory, and a run writes a {what} there; move it away")

    def start(self, config: TrainingSettings) -> None:
        """On rank 0: make the directory that of a run with this configuration. With `resume: never` what the run of
        this name left goes; else the summary of an earlier end, and older states that a killed run has not removed."""
        known, anew = self.manifest(), config.resume == "never"
        names = list(dict.fromkeys([*(known["files"] if known else ()), *FILES]))
        if known is None or anew:
            write_json(self.folder / MANIFEST, {"id": secrets.token_hex(4), "files": names})
        self.remove(names if anew else ["summary.json"])
        self.remove_old_states(config.keep_checkpoints, self.state)
        text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
        write_text(self.folder / "config.yaml", text)

    # ------------------------------------------------------------------------------------------------ states

    def saved(self) -> list[Path]:
        """The states on disk, the newest first."""
        return sorted((own for own in self.states.glob("step-*") if STATE.fullmatch(own.name)), reverse=True)

    def find_state(self, fits: Callable[[dict[str, Any]], bool] = lambda _place: True) -> None:
        """Choose the newest state that is as it was written, and whose place fits; damaged ones are named. For all
        ranks to call."""
        self.state, self.place = None, {}
        share = slice(parallel.rank(), None, parallel.world_size())
        states = parallel.from_rank_zero(self.saved)
        for folder in states:
            files = sorted({name for own in parallel.gather_objects(damaged_files(folder, share)) for name in own})
            if files:
                console.print(f"{folder} is damaged and passed over ({', '.join(files)})", style="yellow", markup=False)
                continue
            place = json.loads((folder / PLACE).read_text())
            if fits(place):
                self.state, self.place = folder, place
                return

    def save_state(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        place: dict[str, Any],
        *,
        keep: int,
        log: bytes = b"",
    ) -> None:
        """Keep all that continuing needs: what is trained, the optimiser, `place` (JSON values with the `step`) and the
        log so far. The newest `keep` states stay, and one at least.

        Another thread writes it while the next step computes its gradient. It makes no copies, so nothing may change
        the tensors before `wait_until_read`.
        """
        self.finish_saving()
        if dist.is_initialized() and self.group is None:
            self.group = dist.new_group(backend="gloo")
        held: list[Part] = []
        target = self.states / f"step-{place['step']:09d}"
        folder = parallel.from_rank_zero(lambda: new_part(target, held))
        buffers = {name: buffer.clone() for name, buffer in own_buffers(module).items()}  # a forward pass changes them
        tensors = trained_tensors(module) | buffers | optimizer_tensors(module, optimizer)
        groups = optimizer.state_dict()["param_groups"]
        place = {**place, "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in groups]}
        texts = {PLACE: json.dumps(place).encode(), LOG: log}
        pool, writer = ThreadPoolExecutor(1), StateWriter(str(folder), save_distributed=True)
        self.read = pool.submit(dcp.save, tensors, storage_writer=writer, process_group=self.group)
        self.pending = pool.submit(self.complete, self.read, writer, next(iter(held), None), texts, keep)
        pool.shutdown(wait=False)  # not `with`, which would wait

    def wait_until_read(self) -> None:
        """Wait until the state that is being written needs this rank's tensors no more."""
        if self.read is not None:
            self.read.exception()  # which `finish_saving` raises
            self.read = None

    def complete(
        self, written: "Future[Any]", writer: "StateWriter", part: Part | None, texts: dict[str, bytes], keep: int
    ) -> None:
        """Finish a state once every rank has written its part. Each rank gives the digest of its own; rank 0, which has
        the `part` of a directory, adds the rest, renames it, and removes older states; and later ones, which were
        passed over."""
        if part is None:
            written.result()
            writer.digests_of_all(self.group)
            return
        try:
            written.result()
            digests = writer.digests_of_all(self.group)
            for name, text in texts.items():
                (part.path / name).write_bytes(text)
            for later in self.saved():
                if later.name >= part.target.name:
                    shutil.rmtree(later)
            end_part(part, known=digests)
        finally:
            part.close()
        self.remove_old_states(keep)

    def remove_old_states(self, keep: int, needed: Path | None = None) -> None:
        """All but the newest `keep`, and one at least."""
        for old in self.saved()[max(1, keep) :]:
            if old != needed:
                shutil.rmtree(old)

    def finish_saving(self) -> None:
        """Wait until the last state is written. For all ranks to call.

        Raises UserError, on each, if it could not be; earlier states are as they were.
        """
        if self.pending is None:
            return
        pending, self.pending, self.read = self.pending, None, None
        error = pending.exception()
        if parallel.sum_over_ranks(torch.tensor(int(error is not None))):
            reason = "; ".join(map(str, root_causes(error))) if error else "another rank says why"
            good = next(iter(self.saved()), "none")
            raise UserError(f"{self.states}: cannot write the state ({reason}). The last good one: {good}") from error

    def load_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the state that `find_state` has found back, whatever number of ranks wrote it."""
        assert self.state is not None
        reader = HuggingFaceStorageReader(str(self.state))
        found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        sizes = {name: tensor.size for name, tensor in found.items()}
        trained, buffers = trained_tensors(module), own_buffers(module)
        rest = sorted(sizes.keys() - trained.keys() - buffers.keys())
        optimiser = {name: like(trained, name, sizes[name]) for name in rest}
        dcp.load({**trained, **buffers, **optimiser}, storage_reader=reader)
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in optimised(module, optimizer).items()}
        for name, tensor in optimiser.items():
            owner, slot = owner_and_slot(name)
            state.setdefault(numbers[owner], {})[slot] = tensor
        state = dict(sorted(state.items()))
        options = self.place["param_groups"][0]  # the same of all: on other ranks there may be other groups
        groups = [{**options, "params": group["params"]} for group in optimizer.state_dict()["param_groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def saved_log(self) -> bytes:
        """The log as it was when the state was saved that the run goes on from."""
        return (self.state / LOG).read_bytes() if self.state else b""

    def log_is_sound(self) -> bool:
        """Whether the log is where the run wrote it, and begins as it was then."""
        log = self.folder / LOG
        return log.is_file() and not log.is_symlink() and log.read_bytes().startswith(self.saved_log())

    # ------------------------------------------------------------------------------------------------ exports

    def export(
        self,
        examples: int,
        write: Callable[[Path], None],
        is_as_wanted: Callable[[Path], bool],
        *,
        link: str,
        keep_others: bool,
    ) -> Path:
        """Let `write` fill `step-<examples>/`, then point a link there in one step.

        Exports that no link leads to go afterwards unless they are kept. One that is there already, and as wanted, is
        not written again: it is for the other link, or by a run killed since, at this very step.
        """
        target = self.folder / f"step-{examples}"
        held: list[Part] = []

        def begin() -> Path | None:
            if target.exists():
                if is_as_wanted(target):
                    return None
                self.remove([target.name])
            self.list_export(target.name)
            return new_part(target, held)

        folder = parallel.from_rank_zero(begin)
        try:
            if folder is not None:
                failure = None
                try:
                    write(folder)
                except OSError as error:
                    failure = error
                parallel.from_rank_zero(lambda: end_part(held[0], failure))
        finally:
            for part in held:
                part.close()
        parallel.from_rank_zero(lambda: self.point_at(target, link, keep_others=keep_others))
        return target

    def point_at(self, target: Path, name: str, *, keep_others: bool) -> None:
        """Let a link lead to an export; the run's exports that none leads to go unless they are kept."""
        link = Part(self.folder / name)
        try:
            link.path.symlink_to(target.name)
            link.path.rename(link.target)
            flush_to_disk(self.folder)
        finally:
            link.close()
        exports = [name for name in (self.manifest() or {"files": []})["files"] if EXPORT.fullmatch(name)]
        if not keep_others:
            used = {self.linked(name) for name in LINKS}
            self.remove([name for name in exports if name not in used])

    def linked(self, name: str) -> str | None:
        """The name of the export that a link leads to; None where there is none."""
        path = self.folder / name
        return path.readlink().name if path.is_symlink() and path.is_dir() else None


class StateWriter(HuggingFaceStorageWriter):
    """Writes each rank's part as a safetensors file, from where the tensors are, one at a time."""

    file: Path | None = None  # of this rank

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "torch.futures.Future[list[WriteResult]]":
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, Any] = {}
        for item in plan.items:
            assert item.tensor_data is not None and item.index.fqn not in tensors
            tensors[item.index.fqn] = cast(Tensor, planner.resolve_data(item))
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        if tensors:
            self.file = Path(self.path) / f"rank-{plan.storage_data['shard_index']:05}.safetensors"
            write_safetensors(self.file, tensors, {CUSTOM_METADATA_KEY: json.dumps(offsets)})
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([])  # only an index of the files would need them
        return done

    def digests_of_all(self, group: dist.ProcessGroup | None) -> dict[str, str]:
        """On rank 0 the digests of all ranks' files, each by the rank that wrote it and knows that it is on disk; on
        others nothing. For all ranks to call. Raises OSError, on rank 0, where a rank cannot read its file."""
        own: dict[str, str] | str = {}
        try:
            if self.file is not None:
                flush_to_disk(self.file)
                own = {self.file.name: file_digest(self.file)}
        except OSError as error:
            own = str(error)
        found: list[Any] = [own]
        if parallel.world_size() > 1:
            found = [None] * parallel.world_size()
            dist.gather_object(own, found if parallel.rank() == 0 else None, group=group)
        if failures := [one for one in found if isinstance(one, str)]:
            raise OSError("; ".join(failures))
        return {name: digest for one in found if one for name, digest in one.items()}


def new_part(target: Path, held: list[Part]) -> Path:
    """A directory to fill, which will be at the target; its `Part` goes to `held`. Raises UserError where there can be
    none."""
    try:
        held.append(Part(target))
        held[0].path.mkdir()
    except OSError as error:
        raise UserError(f"{target.parent}: cannot write there ({in_words(error)})") from error
    return held[0].path


def end_part(part: Part, failure: OSError | None = None, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Let a filled directory appear under its name, sealed, with what digests are known already. Raises UserError if it
    could not be filled."""
    try:
        if failure is not None:
            raise failure
        seal(part.path, known)
        part.finish()
    except OSError as error:
        raise UserError(f"{part.target}: cannot be written ({error}); what was there before is as it was") from error


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, as this rank's slices; writing to them changes the module."""
    reshard(module)
    return {f"model.{name}": p.detach() for name, p in module.named_parameters() if p.requires_grad}


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """What else the module's state holds, such as running means."""
    kept = module.state_dict(keep_vars=True)
    return {f"buffer.{name}": buffer for name, buffer in module.named_buffers() if name in kept}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps for each trained parameter: `optimizer.<slot>:<name of the parameter>`, in an order that
    does not depend on whether it was loaded."""
    named = optimised(module, optimizer)
    return {
        f"optimizer.{slot}:{named[number]}": value
        for number, slots in optimizer.state_dict()["state"].items()
        for slot, value in sorted(slots.items())
        if isinstance(value, Tensor)
    }


def optimised(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The names of the trained tensors by their numbers in the optimiser's state."""
    reshard(module)
    names = {id(parameter): f"model.{name}" for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number: names[id(parameter)] for number, parameter in enumerate(parameters)}


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
