"""Python processes that are forked from one in which the libraries are loaded already.

A new Python takes 8 seconds of CPU to import torch, transformers and datasets, and the tests start a hundred. A fork
has these libraries and nothing of this repo: it imports our code anew and runs the command as `__main__`, with its own
arguments, directory, environment, output and exit status.
"""

import atexit
import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LIBRARIES = ["pytest", "torch", "datasets", "hydra", "openai", "transformers.models.gemma2.modeling_gemma2", "peft"]
LIBRARIES += ["hydra._internal.hydra", "rich.markdown", "rich.live", "rich.progress", "transformers.conversion_mapping"]

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(LIBRARIES)


class Fork:
    """`python ARGUMENTS` in a fork that runs from now on. Where the toy language's data need not be whole, `toy_rows`
    says how many rows its splits have: it takes 5 seconds to make and tokenise all."""

    def __init__(
        self, *arguments: str | Path, cwd: Path = REPO, toy_rows: int | None = None, **environment: str
    ) -> None:
        self.arguments = list(map(str, arguments))
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        own = (self.arguments, cwd, {**os.environ, **environment}, self.outputs, toy_rows)
        self.process = forkserver.Process(target=run_python, args=own)
        self.process.start()

    def result(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for its end. Raises TimeoutExpired after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        with self.folder:
            texts = [path.read_text() for path in self.outputs]
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *texts)


def run_python(
    arguments: list[str], cwd: Path, environment: dict[str, str], outputs: list[Path], toy_rows: int | None
) -> None:
    """Do in this process what `python ARGUMENTS` does: a script, `-c CODE` or `-m MODULE`."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.freeze()  # the libraries' objects stay
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.orig_argv = [sys.executable, *arguments]
    sys.path = [path for path in sys.path if path and not Path(path).is_relative_to(REPO)]
    option, script = arguments[0], Path(arguments[0])
    sys.argv = arguments[1:] if option in ("-c", "-m") else arguments
    sys.path.insert(0, "" if option in ("-c", "-m") else str(script.resolve().parent))
    if toy_rows is not None:
        dataloader = importlib.import_module("dataloader")
        dataloader.TOY_ROWS = {name: dict.fromkeys(splits, toy_rows) for name, splits in dataloader.TOY_ROWS.items()}
    try:
        if option == "-c":
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif option == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(option, run_name="__main__")
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
