"""Ranks: how they start, what they do together, how they stop.

A run is one process, or several ("ranks") that each hold a part of the weights and of every batch. `run` starts them
on this machine, or takes the rank that torchrun, `accelerate launch` or SLURM gave to this process. Only rank 0 prints
and writes, except for files of which every rank writes a part.
"""

import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from transformers.utils import logging as transformers_logging

from utils import UserError, console, end_with_parent

T = TypeVar("T")
GRACE_SECONDS = 10.0  # once a rank has failed, the others have this long to end by themselves
OWN_LAUNCHER = "FPO_LAUNCHER"  # in the environment of ranks that `start_ranks` has started
LOST = 3  # the exit status of such a rank that has lost the connection to another
BEAT_SECONDS, BEATS = 5.0, 12  # a rank of another host that was silent for so many beats is gone
TIMEOUT = timedelta(hours=6)  # how long a rank waits for another: long, since rank 0 may tokenise a large data set
# Outlives the launcher, to say why the ranks are gone: its input closes with the launcher, without a line.
WITNESS = "read line || echo 'the process that started the ranks was killed, so all are ended'"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SLURM can send SIGUSR1 before a time limit


# ---------------------------------------------------------------------------------------------------- together


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """How many ranks each node has, from the launcher; all ranks if it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world_size())


def device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def free_memory() -> int:
    """Bytes that this rank may still take: of its GPU, or an even share of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_per_node()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later tensors. By default it returns large blocks to the system, which zeroes
    their pages again: a tenth of a model's forward pass on a CPU."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # only glibc has it
        trim_threshold, mmap_threshold = -1, -3
        for threshold in (trim_threshold, mmap_threshold):
            mallopt(threshold, 2**31 - 1)  # bytes; the largest value that it accepts


def sum_over_ranks(values: Tensor) -> Tensor:
    """Replace a tensor by its sum over all ranks, on every rank, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """The tensors of all ranks, which must have one shape, concatenated along the first dimension."""
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def max_over_ranks(value: float) -> float:
    """The largest value of a number on any rank, returned on every rank."""
    largest = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Wait until every rank has reached this call."""
    sum_over_ranks(torch.zeros(1))


def from_rank_zero(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 and return its result on every rank. A UserError from it is raised on every rank."""
    if world_size() == 1:
        return work()
    result: Any = None
    message: str | None = None
    if rank() == 0:
        try:
            result = work()
        except UserError as error:
            message = str(error)
    sent = [result, message]
    dist.broadcast_object_list(sent, device=torch.device("cpu"))
    result, message = sent
    if message is not None:
        raise UserError(message)
    return result


# ---------------------------------------------------------------------------------------------------- stopping


class Stopped(SystemExit):
    """Raised after a signal has stopped a run and its state is saved. The exit status says which signal."""


class StopRequest:
    """Records SIGINT, SIGTERM and SIGUSR1, so that a loop can end between two steps. A second one ends it at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only this thread can set handlers
            self.previous = {number: signal.signal(number, self.record) for number in STOP_SIGNALS}
        return self

    def record(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def on_any_rank(self) -> int:
        """The number of the signal that any rank has received, or 0. Every rank must call it, at the same step."""
        return int(max_over_ranks(self.signal))

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "previous", {}).items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- starting


def run(work: Callable[[], None], nproc: int | None = None) -> None:
    """Call `work` on every rank, and end the process: with status 0, 2 for a UserError, 1 for most other errors.

    Starts `nproc` ranks on this machine (None: one for each GPU, or one), unless another launcher has started them. An
    error is printed once, a UserError without a traceback.
    """
    place = launched_place()
    if place is None:
        try:
            count = number_of_ranks(nproc)
        except UserError as error:
            sys.exit(report_error(error))
        if count > 1:
            sys.exit(start_ranks(count))
        place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    elif nproc is not None and nproc != place["WORLD_SIZE"]:
        sys.exit(report_error(UserError(f"nproc={nproc}, but the launcher started {place['WORLD_SIZE']} processes")))
    sys.exit(run_as_rank(place, work))


def launched_place() -> dict[str, int] | None:
    """RANK, WORLD_SIZE and LOCAL_RANK of this process, as its launcher has set them; None without a launcher."""
    names = {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK"}  # torchrun and others
    if "RANK" not in os.environ:
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:  # the step of a batch script or a shell
            return None
    return {name: int(os.environ[variable]) for name, variable in names.items()}


def launched_ranks() -> int | None:
    """How many ranks a launcher has started; None without a launcher."""
    place = launched_place()
    return None if place is None else place["WORLD_SIZE"]


def number_of_ranks(nproc: int | None) -> int:
    """How many processes to start on this machine: `nproc`, or one for each GPU, or one.

    Raises UserError if that is less than one, or more than there are GPUs.
    """
    gpus = torch.cuda.device_count()
    if nproc is None:
        return max(1, gpus)
    if nproc < 1 or (gpus and nproc > gpus):
        raise UserError(f"nproc={nproc}: must be between 1 and {gpus or 'the number of cores'} on this machine")
    return nproc


def start_ranks(count: int) -> int:
    """Start this same command `count` times, as ranks, wait for them, and return the exit status.

    If one rank fails, the others are ended too. Signals are passed on, so that the ranks save their state and stop.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process serves the store, so it outlives rank 0
        OWN_LAUNCHER: "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    shared |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))} | os.environ | shared
    command = [sys.executable, *sys.orig_argv[1:]]
    witness = subprocess.Popen(["sh", "-c", WITNESS], stdin=subprocess.PIPE, start_new_session=True)
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            process_group=0,  # so that Ctrl-C reaches the ranks once, through this process
            preexec_fn=end_with_parent,
        )
        for number in range(count)
    ]

    with passing_on_signals(ranks):
        status = wait_for_ranks(ranks)
    witness.communicate(b"ended\n")
    return status


@contextlib.contextmanager
def passing_on_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside the `with` block signals that stop a run are sent to these processes, and do nothing else here."""

    def pass_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for process in processes:
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have ended; kill those that still run GRACE_SECONDS after another one failed.

    Returns the exit status: the largest among the ranks that were not killed here. It is 128 + n for a rank that
    signal n ended.
    """
    deadline = float("inf")
    while None in (statuses := [process.poll() for process in ranks]) and time.monotonic() < deadline:
        if any(statuses):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)
    killed = {number for number, process in enumerate(ranks) if process.poll() is None}
    for number in killed:
        ranks[number].kill()
        ranks[number].wait()
    ended = {number: process.returncode for number, process in enumerate(ranks) if number not in killed}
    for number, code in ended.items():
        if code < 0:
            console.print(f"rank {number} was ended by {signal.Signals(-code).name}, so all are ended", style="red")
    if LOST in ended.values() and set(ended.values()) <= {0, LOST}:  # no other says what happened
        console.print("a rank has lost the connection to another, so all are ended", style="red")
    return max({LOST: 1}.get(code, code) if code >= 0 else 128 - code for code in ended.values())


def init_process_group(number: int, count: int, store: Any) -> None:
    """Create torch's process group, also for one rank alone, since DTensor and FSDP need one."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)


def run_as_rank(place: dict[str, int], work: Callable[[], None]) -> int:
    """Call `work` as one of several ranks, or as the only one, and return the exit status.

    `place` holds RANK, WORLD_SIZE and LOCAL_RANK.
    """
    alone = place["WORLD_SIZE"] == 1
    if not alone:
        end_with_parent()  # before it waits for others
    if torch.cuda.is_available():
        torch.cuda.set_device(place["LOCAL_RANK"])
    store: Any = None
    if not alone:
        os.environ |= {name: str(value) for name, value in place.items()}  # torch reads them there
        store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    init_process_group(place["RANK"], place["WORLD_SIZE"], store or dist.HashStore())
    heart = Heart() if ranks_per_node() < place["WORLD_SIZE"] else None
    if place["RANK"]:
        console.quiet = True
        transformers_logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    try:
        work()
    except BaseException as error:
        status = report_error(error, None if alone else place["RANK"], store)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # no clean-up that could wait for other ranks: they may be gone
    wait_for_all()
    if heart:
        heart.stop()
    gc.collect()  # the end of the process group sometimes aborts if tensors still hold it
    dist.destroy_process_group()
    gc.collect()
    return 0


class Heart:
    """Lets a run on several hosts end when one of them is cut off, which closes no connection.

    Each rank counts beats in the store and reads those of the next rank, in one thread; another watches how that goes
    on, since a call of a store that cannot be reached may never return. It counts its own beats and not the time, so
    that a run that is suspended as a whole goes on.
    """

    def __init__(self) -> None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        silence = timedelta(seconds=BEATS * BEAT_SECONDS)
        self.store = dist.TCPStore(*address, is_master=False, timeout=silence)  # a connection of its own
        self.stopped = threading.Event()
        self.answers, self.heard = 0, 0  # of the store, and beats of the next rank
        self.is_lost = False  # the store
        self.next_rank = (rank() + 1) % world_size()
        for work in (self.beat, self.watch):
            threading.Thread(target=work, daemon=True).start()

    def beat(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            try:
                self.store.add(f"beats of {rank()}", 1)
                self.heard = self.store.add(f"beats of {self.next_rank}", 0)
            except (RuntimeError, dist.DistError):
                self.is_lost = True
                return
            self.answers += 1

    def watch(self) -> None:
        answers, heard, unanswered, silent = 0, 0, 0, 0
        while not self.stopped.wait(BEAT_SECONDS):
            unanswered = unanswered + 1 if self.answers == answers else 0
            silent = silent + 1 if self.heard == heard else 0
            answers, heard = self.answers, self.heard
            if self.is_lost or unanswered >= BEATS:
                self.end(f"rank {rank()} has lost the host of rank 0")
            if silent >= BEATS:
                self.end(
                    f"rank {rank()} has not heard from rank {self.next_rank} for {BEATS * BEAT_SECONDS:.0f} seconds"
                )

    def end(self, why: str) -> None:
        """End this process, unless its work has ended meanwhile."""
        if not self.stopped.is_set():
            console.quiet = False
            console.print(f"{why}: that host is down or cut off, so this one ends too", style="red")
            sys.stdout.flush()
            os._exit(1)

    def stop(self) -> None:
        self.stopped.set()


def report_error(error: BaseException, number: int | None = None, store: Any = None) -> int:
    """Print the error that ended the work, and return the exit status; LOST where the launcher says what happened.

    Of several ranks, only the first that fails prints. `number` is this rank's, None for a single one.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
    if number is not None:
        try:
            if store.add("failures", 1) > 1:  # another rank has reported; its end may have caused this error
                return status
        except (RuntimeError, dist.DistError):  # the store is gone, and so is the process that serves it
            return status
    console.quiet = False
    if isinstance(error, UserError):
        console.print(str(error), style="red", markup=False)
    elif isinstance(error, KeyboardInterrupt):
        console.print("interrupted", style="red")
    elif number is not None and is_lost_connection(error):
        if OWN_LAUNCHER in os.environ:
            return LOST
        console.print(f"rank {number} has lost the connection to another rank", style="red")
    else:
        prefix = "" if number is None else f"rank {number}: "
        sys.stderr.write(prefix + "".join(traceback.format_exception(error)))
    return status


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, or cannot be reached; why that is so, only the other knows."""
    known = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in known)
    )
