"""Host memory and time of loading a checkpoint on 1, 2 and 4 ranks: `python benchmarks/loading.py`.

Makes a checkpoint of a Llama-shaped model with random weights (`--gigabytes`), loads it on so many ranks of this
machine, and prints what all ranks together held at their peak beyond what they held before (interpreter, libraries),
as a multiple of the checkpoint.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

LAYER = 4 * 2048 * 2048 + 3 * 2048 * 8192  # parameters of one layer


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, round((gigabytes * 1e9 / 4 - 2 * 32_000 * 2048) / LAYER))
    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="2GB")


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def load(folder: Path) -> None:
    """On each rank: load, and let rank 0 print the figures of all together."""
    import torch
    from hydra import compose, initialize_config_dir

    from distributed import parallel
    from launch import assembly, settings

    with initialize_config_dir(str(REPO / "config"), version_base=None):
        model_settings = settings.typed(compose("config", ["loss=sft", "model=tiny"])).model
    parallel.wait_for_all()
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before, started = memory("VmRSS"), time.monotonic()
    model = assembly.build_model(model_settings, "sdpa", 0, folder)
    seconds = parallel.max_over_ranks(time.monotonic() - started)
    figures = torch.tensor([memory("VmHWM") - before, memory("VmRSS") - before], dtype=torch.float64)
    peak, after = parallel.sum_over_ranks(figures).tolist()
    if parallel.rank() == 0:
        print(json.dumps({"peak": peak, "after": after, "seconds": seconds, "parameters": model.num_parameters()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "RANKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        from distributed import parallel

        folder, ranks = arguments.load
        parallel.run(lambda: load(Path(folder)), int(ranks))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, arguments.gigabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB, fp32\n")
        print("| ranks | peak memory of all ranks / checkpoint | afterwards | seconds |\n|---|---|---|---|")
        for ranks in (1, 2, 4):
            command = [sys.executable, __file__, "--load", str(folder), str(ranks)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peak, after = found["peak"] / size, found["after"] / size
            print(f"| {ranks} | {peak:.2f} | {after:.2f} | {found['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
