"""Does every loss move what it should? Trains the built-in model with each on the toy language, and measures.

    python benchmarks/losses.py [LOSS ...]        all of them, about 5 minutes on 2 cores: docs/losses-on-toy.md

Every loss has the hyper-parameters of its YAML, the same 3,200 pairs (or both sides of them), optimiser and schedule.
Measured on 512 held-out pairs and, for policies, on samples for 256 held-out prompts.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

PAIRED = ("dpo", "dpo-norm", "cdpo", "robust", "ld-dpo", "humanline", "wpo", "apo-zero", "apo-down", "ipo", "slic")
PAIRED += ("simpo", "orpo", "tdpo1", "tdpo2", "fpo", "fpo-mse")
UNPAIRED = ("csft", "kto", "kto-zero", "kto-logsigmoid", "kto-surprisal", "bco", "ppo")
LOSSES = ["sft", *PAIRED, *UNPAIRED, "bradley-terry"]
OUTPUT = REPO / "outputs" / "losses"
PAGE = REPO / "docs" / "losses-on-toy.md"


def train(loss: str) -> None:
    """One run, by the command that a user would type; an earlier one of the same configuration is kept."""
    examples, rate = (6400 if loss in UNPAIRED else 3200), 2e-4
    if loss == "csft":  # its control tokens are new to the model, and their embeddings have far to go
        examples, rate = 25_600, 2e-3
    options = f"""datasets=[toy] n_epochs=2 n_examples={examples} optimizer=AdamW lr={rate} lr_schedule=linear
        warmup_steps=20 eval_every=null save_every=null log_every=10 max_new_tokens=32 cache_dir={OUTPUT}
        exp_name={loss}""".split()
    if loss != "bradley-terry":
        options.append("toy_comparison=256")
    command = [sys.executable, "train.py", f"loss={loss}", "model=tiny", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two runs at a time, a core each
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def row(loss: str) -> str:
    """A line of the table."""
    run = OUTPUT / loss
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "loss/eval" in line]
    figures = json.loads((run / "summary.json").read_text())

    def change(name: str) -> str:
        return f"{first[name]:.3f} → {last[name]:.3f}" if name in first else ""

    accuracy = change("logps_eval/accuracies") or change("rewards_eval/accuracies")
    if loss in UNPAIRED or loss == "sft":
        before, after = preference_accuracy(REPO / "assets/tiny"), preference_accuracy(run / "LATEST", loss == "csft")
        accuracy = f"{before:.3f} → {after:.3f}"
    won = "{win_rate:.3f} ({win_rate_low:.3f} to {win_rate_high:.3f})" if "win_rate" in figures else ""
    kl = f"{figures['kl']:.2f}" if "kl" in figures else ""
    score = f"{figures['toy_score_before']:.3f} → {figures['toy_score_after']:.3f}" if "kl" in figures else ""
    cells = [f"`{loss}`", change("loss/eval"), accuracy, score, won.format(**figures), kl]
    return f"| {' | '.join(cells)} |"


def preference_accuracy(weights: Path, controlled: bool = False) -> float:
    """The share of the held-out pairs whose chosen completion is likelier per token than the rejected one."""
    import torch

    import models
    from data import tokenise, toy
    from data.batch import collate
    from dataloader import GOOD

    tokenizer = models.load_tokenizer(weights)
    template = tokenise.PrefixTemplate(toy.USER, "", toy.ASSISTANT, "")
    records = [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "completions": [pair["chosen"], pair["rejected"]],
            "desirable": None,
            "score": None,
            "truncation_mode": "keep_start",
            "source": "toy",
        }
        for pair in toy.preferences("test", seed=0, count=512)
    ]
    rows, _ = tokenise.tokenise(records, tokenizer, template, max_length=512, max_prompt_length=256)
    prefix = [tokenizer.convert_tokens_to_ids(GOOD)] if controlled else []
    batch = collate(
        [{**row, "prompt_ids": row["prompt_ids"] + prefix, "index": i} for i, row in enumerate(rows)],
        "padded",
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
    )
    with torch.no_grad():
        model = models.load_model(weights, "eager", torch.device("cpu"))
        chosen, rejected = models.score(model, batch).mean_logps.split(512)
    return float((chosen > rejected).float().mean())


def main() -> None:
    losses = sys.argv[1:] or LOSSES
    with ThreadPoolExecutor(2) as pool:
        list(track(pool.map(train, losses), "training", total=len(losses), transient=True))
    table = [
        "| `loss=` | its loss | preference accuracy | toy score of samples | win rate against the start | KL |",
        "|---|---|---|---|---|---|",
        *(row(loss) for loss in losses),
    ]
    print("\n".join(table))
    if losses == LOSSES:
        head = PAGE.read_text().split("\n| `loss=`")[0]
        PAGE.write_text(head + "\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
