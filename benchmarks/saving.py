"""What saving costs: `python benchmarks/saving.py`.

Trains a Llama-shaped model with random weights (`--gigabytes`) on 1 and 2 ranks of this machine, saves one state in the
middle and exports at the end. Prints the seconds of a step; those of the step in which a state is written, whose
optimiser waits until the tensors are in the file; how long it took until the state was complete; what reading it back
took; and by how much the peak of the fullest rank's memory was higher in the end than after the steps before the save,
as a multiple of the weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

STEPS, SAVED_AFTER = 12, 3


def build(folder: Path, gigabytes: float) -> None:
    import shutil

    from loading import make_checkpoint

    from data import toy

    make_checkpoint(folder, gigabytes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPO / "assets/tiny" / name, folder)
    rows = toy.preferences("train", seed=0, count=2 * STEPS)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path) -> None:
    """On each rank: train, and let rank 0 print what was measured."""
    from hydra import compose, initialize_config_dir
    from loading import memory

    from distributed import parallel
    from launch import assembly, settings
    from training.checkpoint import Run
    from training.metrics import MetricAccumulator

    overrides = [
        *("loss=sft", "model=tiny", f"model.name_or_path={folder}", f"datasets=[{folder / 'pairs.jsonl'}]"),
        *(f"eval_datasets=[{folder / 'pairs.jsonl'}]", f"cache_dir={folder / 'runs'}", "model.batch_size=2", "lr=1e-5"),
    ]
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        config, classes = settings.check_config(compose("config", overrides))
        paths = settings.find_paths(config, classes.binding.needs)
    config = settings.with_defaults(config, paths)
    run = Run(folder / "runs" / f"on-{parallel.world_size()}")
    trainer = assembly.prepare(config, classes, paths, run)
    trainer.start_optimizer()
    means, alone, meanwhile, peak = MetricAccumulator(), list[float](), 0.0, 0
    for step, micro_batches in enumerate(trainer.loaders["train"].steps()):
        busy = run.read is not None
        started = time.monotonic()
        trainer.module.train()
        trainer.optimise(step, micro_batches, means)
        if busy:
            meanwhile = time.monotonic() - started
        elif step:  # the first one also makes the optimiser's tensors
            alone.append(time.monotonic() - started)
        if step == SAVED_AFTER:
            peak, started = memory("VmHWM"), time.monotonic()
            run.save_state(trainer.module, trainer.optimizer, {"step": step}, keep=1)
            ends: list[float] = []
            assert run.pending is not None
            run.pending.add_done_callback(lambda _, ends=ends: ends.append(time.monotonic()))
            begun = started
    run.finish_saving()
    written = ends[0] - begun
    trainer.export(1, 1)
    more = parallel.max_over_ranks(memory("VmHWM") - peak)
    run.find_state()
    started = time.monotonic()
    run.load_state(trainer.module, trainer.optimizer)
    read = time.monotonic() - started
    if parallel.rank() == 0:
        figures = {"step": median(alone), "meanwhile": meanwhile, "written": written, "read": read}
        print(json.dumps({**figures, "more": more}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "RANKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        from distributed import parallel

        folder, ranks = arguments.train
        parallel.run(lambda: train(Path(folder)), int(ranks))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, arguments.gigabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"weights: {size / 1e9:.2f} GB, fp32; a state: twice that\n")
        print("| ranks | a step, s | with a save, s | complete after, s | read back in, s | memory beyond the steps' |")
        print("|---|---|---|---|---|---|")
        for ranks in (1, 2):
            command = [sys.executable, __file__, "--train", str(folder), str(ranks)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            found = json.loads(done.stdout.splitlines()[-1])
            seconds = (f"{found[name]:.2f}" for name in ("step", "meanwhile", "written", "read"))
            print(f"| {ranks} | {' | '.join(seconds)} | {found['more'] / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
