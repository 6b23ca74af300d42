"""What `++mode=plan` says against what training takes, on the CPU: `python benchmarks/plan_memory.py`.

Trains a random Gemma-2-shaped model of 60 M parameters for two steps, on pairs as long as they may be, with each of
some configurations, and prints the resident memory of the fullest rank at the peak of a step, beyond what it held
before the model was built, beside the plan.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

CASES = {
    "simpo, 1 rank": (1, ["loss=simpo"]),
    "simpo, 2 ranks": (2, ["loss=simpo"]),
    "simpo, 2 ranks, AdamW": (2, ["loss=simpo", "optimizer=AdamW"]),
    "simpo, 2 ranks, full checkpointing": (2, ["loss=simpo", "++model.activation_checkpointing=full"]),
    "tdpo2, 2 ranks": (2, ["loss=tdpo2"]),
    "simpo, LoRA, 1 rank": (1, ["loss=simpo", "++model.use_peft=true"]),
}


def build(folder: Path) -> None:
    """A model directory, and pairs that fill it to its limits."""
    import shutil

    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=16_384,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=80,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPO / "assets/tiny" / name, folder)
    words = " ".join(str(number) for number in range(600))
    row = {"prompt": words, "chosen": words, "rejected": words + " 1"}
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({**row, "prompt": f"{i} {words}"}) + "\n" for i in range(16))
    )


def settings(folder: Path, own: list[str], name: str) -> list[str]:
    return [
        *("model=tiny", f"model.name_or_path={folder}", f"datasets=[{folder / 'pairs.jsonl'}]"),
        *(f"eval_datasets=[{folder / 'pairs.jsonl'}]", f"cache_dir={folder / 'runs'}", f"exp_name='{name}'"),
        *("++model.batch_size=4", "++model.max_length=384", "++model.max_prompt_length=128", "++n_examples=8"),
        *("++n_eval_examples=2", "++model.eval_batch_size=2", "++do_first_eval=false", "++save_every=null", *own),
    ]


def train(folder: Path, own: list[str], name: str) -> None:
    """On each rank: train, and let rank 0 print the peak of the fullest."""
    from hydra import compose, initialize_config_dir
    from loading import memory

    import train as command
    from distributed import parallel
    from training import loop

    overrides = settings(folder, own, name)
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        config = compose("config", overrides)
        before = memory("VmRSS")
        peak = 0.0
        update = loop.BasicTrainer.update

        def measured(self, *arguments):  # the steps alone: what evaluating and saving take is not in the plan
            nonlocal peak
            update(self, *arguments)
            peak = parallel.max_over_ranks(memory("VmHWM") - before)

        loop.BasicTrainer.update = measured  # type: ignore[method-assign]
        command.train(config)
    if parallel.rank() == 0:
        print(json.dumps({"peak": peak}))


def planned(folder: Path, own: list[str], ranks: int) -> float:
    from hydra import compose, initialize_config_dir

    from launch import plan
    from launch import settings as checks

    with initialize_config_dir(str(REPO / "config"), version_base=None):
        config, classes = checks.check_config(
            compose("config", [*settings(folder, own, "plan"), "mode=plan"]), ["plan"]
        )
        return plan.make(config, classes, ranks).peak


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        from distributed import parallel

        folder, name = Path(sys.argv[2]), sys.argv[3]
        ranks, own = CASES[name]
        parallel.run(lambda: train(folder, own, name), ranks)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder)
        print("| | planned, GB | measured, GB | measured / planned |\n|---|---|---|---|")
        for name, (ranks, own) in CASES.items():
            command = [sys.executable, __file__, "--train", str(folder), name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            measured, plan = json.loads(done.stdout.splitlines()[-1])["peak"], planned(folder, own, ranks)
            print(f"| {name} | {plan / 1e9:.2f} | {measured / 1e9:.2f} | {measured / plan:.2f} |", flush=True)


if __name__ == "__main__":
    main()
