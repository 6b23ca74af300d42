"""What a step costs, counted: floating-point operations, tokens, memory; and how fast it went."""

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from data.batch import PAD, Batch
from distributed import parallel
from models import decoder_layers

# Dense bf16 multiplications and additions a second, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
}


@dataclass(frozen=True)
class Flops:
    """Operations of a forward and a backward pass: 6 for each parameter that a token is multiplied with (2 forward, 4
    backward), and 6 * width * length for its causal attention in each layer. Recomputed activations do not count."""

    per_token: float  # of a row
    per_target: float  # projected onto the vocabulary
    per_square: float  # of a document's length

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Flops":
        config: Any = model.config.get_text_config()
        layers = decoder_layers(model)
        matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
        width = config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        return cls(6.0 * matrices, 6.0 * config.hidden_size * config.vocab_size, 6.0 * len(layers) * width)

    def count(self, batch: Batch) -> float:
        lengths = torch.bincount(batch.document[batch.document != PAD])
        return float(
            self.per_token * lengths.sum()
            + self.per_target * len(batch.target)
            + self.per_square * lengths.double().square().sum()
        )


class ThroughputMeter:
    """How fast steps go, from its making to `read`, over all ranks."""

    def __init__(self, flops: Flops) -> None:
        self.flops = flops
        self.since = time.monotonic()
        self.tokens, self.records, self.operations = 0, 0.0, 0.0

    def add(self, micro_batches: list[Batch], passes: int) -> None:
        """One step of this rank, of so many updates from the same batches."""
        self.count(
            tokens=sum(int((batch.document != PAD).sum()) for batch in micro_batches),
            records=sum(len(batch.index) for batch in micro_batches),
            operations=passes * sum(self.flops.count(batch) for batch in micro_batches),
        )

    def count(self, tokens: int, records: float, operations: float) -> None:
        """One step of this rank."""
        self.tokens, self.records = self.tokens + tokens, self.records + records
        self.operations += operations

    def read(self) -> dict[str, float]:
        """Seconds; tokens and examples a second; the peak memory of the fullest rank so far; and, where the GPU is
        known, the share of its arithmetic that the model's own operations took (MFU)."""
        seconds = time.monotonic() - self.since
        own = torch.tensor([self.tokens, self.records, self.operations], dtype=torch.float64)
        tokens, records, operations = parallel.sum_over_ranks(own).tolist()
        found = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "examples_per_second": records / seconds,
            "peak_memory_gb": parallel.max_over_ranks(peak_memory()) / 1e9,
        }
        if peak := peak_flops():
            found["mfu"] = operations / seconds / parallel.world_size() / peak
        return found


def peak_memory() -> float:
    """Bytes: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def peak_flops() -> float | None:
    """Of this rank's GPU, if it is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
