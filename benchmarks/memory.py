"""Peak memory of a training run by loss, at a large vocabulary.

    python benchmarks/memory.py          a minute or two on 2 cores; writes docs/memory.md

The model is random, of Gemma 2's architecture, with 65,536 words and width 256, so that logits are what memory could go
to: those of one batch, whole, would take the size that the last column says, for TDPO twice (policy and reference).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

VOCABULARY, WIDTH, LATENTS = 65_536, 256, 4_096
LOSSES = ("sft", "simpo", "dpo", "fpo", "tdpo1", "tdpo2")
PAGE = REPO / "docs" / "memory.md"
HEAD = f"""# Peak memory by loss

Made by `python benchmarks/memory.py`: two optimiser steps of 16 pairs of about 100 + 200 + 200 tokens on a random model
of Gemma 2's architecture with {VOCABULARY:,} words, in fp32 on the CPU. *Peak* is the largest resident set of the whole
process, libraries included; *over `simpo`* is what the loss takes beyond that paired loss without a reference. `tdpo1`
and `tdpo2` hold a second model of {{model}} MB, and no loss holds the logits of a whole batch ({{logits}} MB; a TDPO
that did would hold two).
"""


def build(folder: Path) -> int:
    """Write the model, its tokenizer, an SAE and the data; gives the completion tokens of a batch."""
    import shutil

    from transformers import Gemma2Config, Gemma2ForCausalLM

    from sae import SAE
    from sae_formats import save_sae

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPO / "assets/tiny" / name, folder / "model")
    wide = torch.randn(WIDTH, LATENTS)
    zeros = torch.zeros(LATENTS)
    save_sae(SAE(wide, zeros, wide.T.contiguous(), torch.zeros(WIDTH), zeros + 16), folder / "params.npz")
    words = {side: " ".join(["table"] * count) for side, count in (("prompt", 100), ("chosen", 199), ("rejected", 199))}
    rows = [{**words, "prompt": f"{number} {words['prompt']}"} for number in range(32)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 16 * 2 * 200


def peak(folder: Path, loss: str) -> float:
    """Peak resident memory of one run, in MB."""
    command = [sys.executable, "train.py", f"loss={loss}", "model=tiny", f"model.name_or_path={folder}/model"]
    command += [f"datasets=[{folder}/pairs.jsonl]", f"eval_datasets=[{folder}/pairs.jsonl]", f"cache_dir={folder}/out"]
    command += ["model.batch_size=16", "model.eval_batch_size=4", "n_eval_examples=4", f"exp_name={loss}"]
    command += [f"sae.path={folder}/params.npz"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads((folder / "out" / loss / "summary.json").read_text())["peak_rss_mb"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = build(folder)
        model = (folder / "model" / "model.safetensors").stat().st_size / 2**20
        peaks = {loss: peak(folder, loss) for loss in LOSSES}
    head = HEAD.format(model=f"{model:,.0f}", logits=f"{tokens * VOCABULARY * 4 / 2**20:,.0f}")
    rows = [f"| `{loss}` | {mb:,.0f} | {mb - peaks['simpo']:+,.0f} |" for loss, mb in peaks.items()]
    table = ["| `loss=` | peak, MB | over `simpo`, MB |", "|---|---|---|", *rows]
    print("\n".join(table))
    PAGE.write_text(head + "\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
