"""The table of docs/scale.md of what each model takes: `python benchmarks/plans.py`.

It plans DPO with each model's defaults for some machines, and where that is more than nine tenths of a card, with the
first of some changes that makes it fit. Nothing is downloaded, and no GPU is needed.
"""

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from hydra import compose, initialize_config_dir  # noqa: E402

from launch import plan, settings  # noqa: E402
from utils import console  # noqa: E402

MACHINES = {"8 x 80 GB": (8, 80e9), "8 x 40 GB": (8, 40e9), "1 x 80 GB": (1, 80e9), "1 x 24 GB": (1, 24e9)}
CHANGES = {  # to the defaults; each is tried with those before it
    "": [],
    "full": ["++model.activation_checkpointing=full"],
    "4,096": ["++model.max_tokens=4096"],
    "LoRA": ["++model.use_peft=true"],
    "4 bits": ["++model.load_in_4bit=true"],
}
LEAST = 0.9  # of a card, for what is planned


def planned(model: str, ranks: int, changes: list[str]) -> plan.Plan:
    overrides = ["loss=dpo", f"model={model}", "~sae", "datasets=[toy]", "mode=plan", *changes]
    config, classes = settings.check_config(compose("config", overrides), ["plan"])
    return plan.make(config, classes, ranks)


def cell(model: str, ranks: int, card: float) -> str:
    """The planned GB of a rank, with the changes that it takes to fit."""
    made: list[str] = []
    named: list[str] = []
    before = float("inf")
    for name, change in CHANGES.items():
        peak = planned(model, ranks, [*made, *change]).peak
        if name and peak >= before:  # it is so already
            continue
        made, before = [*made, *change], peak
        named += [name] if name else []
        if peak < LEAST * card:
            return f"{peak / 1e9:.0f}" + (f" ({', '.join(named)})" if named else "")
    return "no"


def main() -> None:
    console.quiet = True
    print(f"| `model=` | parameters | {' | '.join(MACHINES)} |\n|---|---|{'---|' * len(MACHINES)}", flush=True)
    for model in settings.choices_of("model"):
        if model.startswith("tiny") or model.endswith(("-it", "-instruct", "_instruct")):
            continue  # an instruct model takes what its base model does
        size = planned(model, 8, []).parameters
        cells = [cell(model, *machine) for machine in MACHINES.values()]
        print(f"| `{model}` | {size / 1e9:,.2f} B | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        main()
