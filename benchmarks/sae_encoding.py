"""Memory of reading features at Gemma-2-2B's width: 2,304 numbers a token, 16,384 features.

    python benchmarks/sae_encoding.py     two to five minutes on 2 cores; exits with 1 where a bound is broken

Each way runs in a process of its own, on random numbers, and is measured by how far it raises the largest resident set
above what was there before it: the libraries, the SAE (290 MB) and the residual stream of the tokens.

    pooled     the mean features of each sequence, without gradient: what decides which latents are compared, and what
               the reference cache holds
    selected   the compared latents with gradient, forward and backward
    drift      both, as FPO's loss does them: forward and backward of `feature_drift`
    dense      the same drift from all features of all tokens, as the formula is written
"""

import argparse
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

D_IN, D_SAE, K, SEQUENCES = 2304, 16_384, 50, 16
WAYS = ("pooled", "selected", "drift", "dense")
MB = 2**20
CHUNK = 64  # MB of activations held at once (sae.ENCODE_ELEMENTS)


def bound(way: str, kind: str, tokens: int) -> float:
    """MB that a way may take: some chunks' worth, and what grows with the tokens, all of it in fp32."""
    residual = tokens * D_IN * 4 / MB
    columns = SEQUENCES * D_IN * 2 * K * 4 / MB  # of the encoder, kept for the backward pass
    chunks = 6 * CHUNK
    return {
        "pooled": chunks,
        "selected": 3 * residual + 2 * columns + (chunks if kind == "topk" else 0) + 32,
        "drift": 3 * residual + 2 * columns + chunks + 32,
    }.get(way, float("inf"))


def make(kind: str) -> Any:
    """An SAE with about 100 active features a token."""
    from sae import SAE

    torch.manual_seed(0)
    threshold = torch.full((D_SAE,), 2.5 if kind == "jumprelu" else 0.0)
    encoder = torch.randn(D_IN, D_SAE).div_(D_IN**0.5)
    return SAE(
        encoder, torch.zeros(D_SAE), encoder.T, torch.zeros(D_IN), threshold, k=None if kind == "jumprelu" else 100
    )


def measure(way: str, kind: str, tokens: int) -> float:
    """MB by which one way raises this process's peak."""
    from sae import compute_feature_drift, pooled_features, selected_features

    sae = make(kind)
    lengths = [tokens // SEQUENCES] * SEQUENCES
    residual = torch.randn(sum(lengths), D_IN, requires_grad=True)
    reference = torch.rand(SEQUENCES, D_SAE)
    before = resident()
    with Peak() as peak:
        if way == "pooled":
            pooled_features(sae, residual, lengths)
        elif way == "selected":
            latents = reference.topk(2 * K).indices
            selected_features(sae, residual, lengths, latents).sum().backward()
        elif way == "drift":
            compute_feature_drift(sae, residual, lengths, reference, divergence="mse", k=K).sum().backward()
        else:
            pooled = torch.stack([part.mean(0) for part in sae.encode(residual).split(lengths)])
            (pooled - reference).square().sum().backward()
    return peak.mb - before


def resident() -> float:
    """MB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MB


class Peak:
    """The largest `resident` while the block runs, looked at every millisecond."""

    def __enter__(self) -> "Peak":
        self.mb, self.done = resident(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.mb = max(self.mb, resident())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.mb = max(self.mb, resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help=f"of {SEQUENCES} sequences together")
    parser.add_argument("--only", nargs=2, metavar=("WAY", "KIND"), help="measure one, in this process")
    arguments = parser.parse_args()
    if arguments.only:
        way, kind = arguments.only
        print(measure(way, kind, arguments.tokens))
        return
    print("| | ReLU, JumpReLU, MB | bound | TopK, MB | bound |\n|---|---|---|---|---|")
    broken = False
    for way in WAYS:
        cells = []
        for kind in ("jumprelu", "topk"):
            command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--only", way, kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            taken, limit = float(done.stdout), bound(way, kind, arguments.tokens)
            broken |= taken > limit
            cells += [f"{taken:,.0f}", "" if limit == float("inf") else f"{limit:,.0f}"]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)
    sys.exit(int(broken))


if __name__ == "__main__":
    main()
