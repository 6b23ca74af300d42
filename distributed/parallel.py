"""Ranks: how they are started, what they do together, how they stop.

A run is one process, or several ("ranks") that each hold a part of the weights and of every batch. `run` starts them
on this machine, or takes the place that torchrun, `accelerate launch` or SLURM gave this process. Only rank 0 prints
and writes, except where every rank has a part of its own to write.
"""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from transformers.utils import logging as transformers_logging

from utils import UserError, console

T = TypeVar("T")
PATIENCE = 10.0  # seconds that the other ranks have to end by themselves once one has failed
TIMEOUT = timedelta(hours=6)  # of waiting for another rank: long, for rank 0 may be tokenising a large data set
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what SLURM can send before a time limit


# ---------------------------------------------------------------------------------------------------- together


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """As the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world_size())


def device() -> torch.device:
    """Where this rank computes: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the tensors to come. It would give large ones back to the system, which then
    has to zero their pages anew: a tenth of a model's forward pass on a CPU."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's alone
        trim_threshold, mmap_threshold = -1, -3
        for threshold in (trim_threshold, mmap_threshold):
            mallopt(threshold, 2**31 - 1)  # bytes, and the most that it takes


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on each of them, in its place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, one after the other along the first dimension."""
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def max_over_ranks(value: float) -> float:
    """The largest of a number over all ranks, on each of them."""
    found = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def gather_objects(value: T) -> list[T]:
    """What each rank gives, by rank, on all of them."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    sum_over_ranks(torch.zeros(1))


def from_rank_zero(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank. A UserError there is raised on all of them."""
    if world_size() == 1:
        return work()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


def rank_zero_first(work: Callable[[], T]) -> T:
    """Do `work` on rank 0, which leaves on disk what the others then find there. A UserError there reaches all."""
    found: list[T] = []
    from_rank_zero(lambda: found.append(work()))
    return found[0] if found else work()


# ---------------------------------------------------------------------------------------------------- stopping


class Stopped(SystemExit):
    """Raised when a run has stopped on a signal, with its state saved; the exit status says which signal."""


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGUSR1 so that a loop can end between two steps. The second one ends at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # handlers cannot be set elsewhere
            self.previous = {number: signal.signal(number, self.note) for number in STOP_SIGNALS}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def anywhere(self) -> int:
        """The signal that came on any rank, or 0. Every rank has to ask, and all get an answer at the same step."""
        return int(max_over_ranks(self.signal))

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "previous", {}).items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- starting


def run(work: Callable[[], None], nproc: int | None = None) -> None:
    """Do `work` on every rank, and end the process with the status it deserves.

    `nproc` ranks are started on this machine (null: one for each GPU, or one), unless another launcher has started
    them. A UserError is printed once, without a traceback, and the status is 2.
    """
    place = given_place()
    if place is None:
        try:
            count = number_of_ranks(nproc)
        except UserError as error:
            sys.exit(tell(error))
        if count > 1:
            sys.exit(launch(count))
        place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    elif nproc is not None and nproc != place["WORLD_SIZE"]:
        sys.exit(tell(UserError(f"nproc={nproc}, but the launcher started {place['WORLD_SIZE']} processes")))
    sys.exit(work_as(place, work))


def given_place() -> dict[str, int] | None:
    """Which of how many processes a launcher says this one is; None where nobody says."""
    names = {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK"}  # torchrun, accelerate, `launch`
    if "RANK" not in os.environ:
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:  # a batch script's or a shell's own step
            return None
    return {name: int(os.environ[variable]) for name, variable in names.items()}


def ranks_given() -> int | None:
    """How many ranks a launcher has started; None where there is none."""
    place = given_place()
    return None if place is None else place["WORLD_SIZE"]


def number_of_ranks(nproc: int | None) -> int:
    """How many processes to start here. Raises UserError for more than there are GPUs, or for less than one."""
    gpus = torch.cuda.device_count()
    if nproc is None:
        return max(1, gpus)
    if nproc < 1 or (gpus and nproc > gpus):
        raise UserError(f"nproc={nproc}: has to be between 1 and {gpus or 'the number of cores'} here")
    return nproc


def launch(count: int) -> int:
    """Start this very command `count` times, as ranks, and wait; gives the exit status.

    When a rank fails the others are ended too. Signals are handed on, for the ranks to save and stop.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is served from here, so it outlives rank 0
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    shared |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))} | os.environ | shared
    command = [sys.executable, *sys.orig_argv[1:]]
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            process_group=0,  # so that Ctrl-C comes to the ranks once, from here
        )
        for number in range(count)
    ]

    def hand_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for process in ranks:
            process.send_signal(number)

    for name in STOP_SIGNALS:
        signal.signal(name, hand_on)
    while any(process.poll() is None for process in ranks) and not any(process.returncode for process in ranks):
        time.sleep(0.05)
    patience = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in ranks) and time.monotonic() < patience:
        time.sleep(0.05)
    hung = {number for number, process in enumerate(ranks) if process.poll() is None}
    for number in hung:
        ranks[number].kill()
        ranks[number].wait()
    ended = {number: process.returncode for number, process in enumerate(ranks) if number not in hung}
    for number, code in ended.items():
        if code < 0:
            console.print(f"rank {number} was ended by {signal.Signals(-code).name}", style="red")
    return max(code if code >= 0 else 128 - code for code in ended.values())


def join(number: int, count: int, store: Any) -> None:
    """Make the process group, of one rank too: some of what is used works only within one."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)


def work_as(place: dict[str, int], work: Callable[[], None]) -> int:
    """Do `work` as one rank of several, or as the only one; gives the exit status."""
    alone = place["WORLD_SIZE"] == 1
    if torch.cuda.is_available():
        torch.cuda.set_device(place["LOCAL_RANK"])
    store: Any = None
    if not alone:
        os.environ |= {name: str(value) for name, value in place.items()}  # where torch looks for them
        store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        _prctl_pr_set_pdeathsig(signal.SIGKILL)  # on Linux, so that no rank outlives what started it
    join(place["RANK"], place["WORLD_SIZE"], store or dist.HashStore())
    if place["RANK"]:
        console.quiet = True
        transformers_logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    try:
        work()
    except BaseException as error:
        status = tell(error, None if alone else place["RANK"], store)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the other ranks may be gone: nothing that waits for them may run any more
    wait_for_all()
    gc.collect()  # tensors that still hold the process group make its end abort now and then
    dist.destroy_process_group()
    gc.collect()
    return 0


def tell(error: BaseException, number: int | None = None, store: Any = None) -> int:
    """Print what ended the work, on the first rank that it ended; gives the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
    if number is not None:
        try:
            if store.add("failures", 1) > 1:  # told by another rank, whose end may have been what ended this one
                return status
        except (RuntimeError, dist.DistError):  # the store is gone, and rank 0 with it
            return status
    console.quiet = False
    if isinstance(error, UserError):
        console.print(str(error), style="red", markup=False)
    elif isinstance(error, KeyboardInterrupt):
        console.print("interrupted", style="red")
    else:
        prefix = "" if number is None else f"rank {number}: "
        sys.stderr.write(prefix + "".join(traceback.format_exception(error)))
    return status
