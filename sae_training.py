"""Training a sparse autoencoder on one layer's residual stream: `loss=sae`.

BatchTopK (Bussmann et al. 2024, 2412.06410): in training the k * M largest pre-activations of a batch of M tokens stay;
a running mean of the smallest of them becomes the threshold of a JumpReLU, which is what is evaluated and saved, in
Gemma Scope's layout. The model itself is frozen.

Shape letters: M tokens of text, D width of the residual stream, F latents.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from batch import PAD, Batch
from models import decoder_layers, final_hidden_states, score
from sae import SAE, ResidualTap
from sae_formats import load_sae, save_sae
from trainers import BasicTrainer, Means, Setup
from utils import UserError
from vocabulary import Binding

START_TOKENS = 20_000  # how many the input scale and the decoder's bias are set from
THRESHOLD_DECAY = 0.999


class BatchTopK(nn.Module):
    """The autoencoder in training. It sees inputs scaled to unit mean square and has unit-norm decoder rows."""

    scale: Tensor  # [] multiplies the residual stream
    threshold: Tensor  # [] the JumpReLU's, of scaled inputs
    silent: Tensor  # [F] training tokens since the latent last fired

    def __init__(self, start: Tensor, d_sae: int, k: int) -> None:
        """From residual vectors [M, D] to start from: their scale, and their mean as the decoder's bias."""
        super().__init__()
        self.k = k
        self.register_buffer("scale", start.square().mean().rsqrt())
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("silent", torch.zeros(d_sae))
        rows = nn.functional.normalize(torch.randn(d_sae, start.shape[1]), dim=1).to(start.device)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.contiguous())
        self.b_enc = nn.Parameter(rows.new_zeros(d_sae))
        self.b_dec = nn.Parameter(start.mean(0) * self.scale)

    def preactivations(self, x: Tensor) -> Tensor:
        """[M, F] of scaled inputs [M, D]."""
        return ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def sparse(self, pre: Tensor) -> Tensor:
        """The k largest for each token of the batch, on average, and zero for the rest."""
        kept = pre.flatten().topk(min(self.k * len(pre), pre.numel()), sorted=False)
        return torch.zeros_like(pre).flatten().scatter(0, kept.indices, kept.values).view_as(pre)

    @torch.no_grad()
    def observe(self, features: Tensor) -> None:
        """Follow the threshold and the silence of the latents over one batch of features [M, F]."""
        active = features > 0
        self.silent += len(features)
        self.silent[active.any(0)] = 0
        smallest = features[active].min() if active.any() else self.threshold
        decay = THRESHOLD_DECAY if self.threshold > 0 else 0.0
        self.threshold.lerp_(smallest, 1 - decay)

    @torch.no_grad()
    def keep_unit_rows(self) -> None:
        self.W_dec.copy_(nn.functional.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """Take out of the decoder's gradient what would only change its rows' norm."""
        if self.W_dec.grad is not None:
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    def frozen(self) -> SAE:
        """The same autoencoder as a JumpReLU on unscaled inputs; its decoder rows keep unit norm."""
        return SAE(
            W_enc=self.W_enc,
            b_enc=(self.b_enc - self.b_dec @ self.W_enc) / self.scale,
            W_dec=self.W_dec,
            b_dec=self.b_dec / self.scale,
            threshold=(self.threshold / self.scale).expand(len(self.W_dec)).clone(),
        )


class SAETrainer(BasicTrainer):
    """Trains a `BatchTopK` on the residual stream after one layer (null: the last), of all text tokens of the data.

    An auxiliary loss revives latents that were silent for `dead_after` tokens: they alone reconstruct what the
    others left over (Gao et al. 2024, 2406.04093, section 2.4).
    """

    def __init__(
        self, setup: Setup, *, layer: int | None, d_sae: int, k: int, dead_after: int, auxiliary: float
    ) -> None:
        layers = decoder_layers(setup.policy)
        self.layer = len(layers) - 1 if layer is None else layer
        if not 0 <= self.layer < len(layers):
            raise UserError(f"loss.layer={layer}: the model has layers 0 to {len(layers) - 1}")
        self.d_sae, self.dead_after, self.auxiliary = d_sae, dead_after, auxiliary
        setup.policy.requires_grad_(False).eval()
        self.reader = ResidualTap(layers[self.layer])
        self.policy, self.tokenizer = setup.policy, setup.tokenizer
        self.device = next(setup.policy.parameters()).device
        start = torch.cat(list(self.first_residuals(setup)))
        self.autoencoder = BatchTopK(start, d_sae, k)
        self.exported: SAE | None = None
        super().__init__(setup)
        self.optimizer.register_step_pre_hook(lambda *_: self.autoencoder.drop_parallel_gradient())
        self.optimizer.register_step_post_hook(lambda *_: self.autoencoder.keep_unit_rows())

    @classmethod
    def check(cls, config: DictConfig, binding: Binding) -> None:  # noqa: ARG003
        if config.model.layout == "shared_prefix":
            raise UserError(
                "model.layout=shared_prefix: would count a prompt's tokens once for several completions; packed"
            )

    def first_residuals(self, setup: Setup) -> Iterator[Tensor]:
        tokens = 0
        for micro_batches in setup.loaders["train"].steps():
            for batch in micro_batches:
                yield self.residuals(batch.to(self.device))
                tokens += self.weight(batch)
            if tokens >= START_TOKENS:
                return

    def trained_module(self) -> nn.Module:
        return self.autoencoder

    def loss(self) -> None:
        """Not a loss of log-probabilities: see `compute_loss`."""

    def text(self, batch: Batch) -> Tensor:
        """Which positions [R, T] hold text: SAEs are neither trained nor read on BOS, EOS and padding."""
        special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        tokens = torch.tensor([i for i in special if i is not None], device=batch.input_ids.device)
        return (batch.document != PAD) & ~torch.isin(batch.input_ids, tokens)

    def weight(self, batch: Batch) -> int:
        return int(self.text(batch).sum())

    @torch.no_grad()
    def residuals(self, batch: Batch) -> Tensor:
        """The residual stream [M, D] at the text tokens."""
        with self.reader.reading():
            final_hidden_states(self.policy, batch)
        return self.reader.take()[self.text(batch)].float()

    def compute_loss(self, batch: Batch, split: str, means: Means) -> Tensor:
        """Squared errors [M] of the reconstruction of each token, in units of the scaled input, summed over D."""
        sae = self.autoencoder
        x = self.residuals(batch.to(self.device)) * sae.scale
        pre = sae.preactivations(x)
        features = sae.sparse(pre)
        sae.observe(features)
        error = x - (features @ sae.W_dec + sae.b_dec)
        losses = error.square().sum(1)
        means.add(f"loss/{split}", losses)
        means.add(f"sae_{split}/l0", (features > 0).sum(1))
        dead = sae.silent > self.dead_after
        means.add(f"sae_{split}/dead", dead)
        if dead.any():
            revived = (pre * dead).topk(min(self.d_sae, x.shape[1] // 2))
            auxiliary = torch.zeros_like(pre).scatter(1, revived.indices, revived.values) @ sae.W_dec
            losses = losses + self.auxiliary * (error.detach() - auxiliary).square().sum(1)
        return losses

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of the frozen JumpReLU on the evaluation set: L0 (active features a token), FVU (squared error over the
        variance around the mean of each dimension), CE recovered (how much of the loss between zeroing the residual
        stream and leaving it alone the reconstruction wins back) and the share of dead latents."""
        frozen, count, errors, active = self.exported or self.autoencoder.frozen(), 0, 0.0, 0.0
        total, squares = torch.zeros(frozen.d_in, device=self.device), 0.0
        entropy = {"clean": 0.0, "sae": 0.0, "zero": 0.0}
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "clean": lambda x: x,
            "sae": lambda x: frozen.decode(frozen.encode(x)).to(x.dtype),
            "zero": torch.zeros_like,
        }
        completion_tokens = 0
        for (batch,) in self.steps("eval"):
            batch = batch.to(self.device)
            x = self.residuals(batch)
            features = frozen.encode(x)
            count += len(x)
            total, squares = total + x.sum(0), squares + float(x.square().sum())
            errors += float((x - frozen.decode(features)).square().sum())
            active += float((features > 0).sum())
            completion_tokens += sum(batch.lengths)
            for name, change in changes.items():
                with self.replaced(self.text(batch), change):
                    entropy[name] -= float(score(self.policy, batch).logps.sum())
        variance = squares - float(total.square().sum()) / count
        lost, range_ = entropy["zero"] - entropy["sae"], entropy["zero"] - entropy["clean"]
        return {
            "loss/eval": errors / count,
            "sae_eval/l0": active / count,
            "sae_eval/fvu": errors / variance,
            "sae_eval/ce_recovered": lost / range_,
            "sae_eval/dead": float((self.autoencoder.silent > self.dead_after).float().mean()),
            **{f"sae_eval/ce_{name}": value / completion_tokens for name, value in entropy.items()},
        }

    @contextmanager
    def replaced(self, where: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Forward passes in which the tapped layer's output is changed at some positions [R, T]."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            residual = output if isinstance(output, Tensor) else output[0]
            changed = residual.clone()
            changed[where] = change(residual[where])
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        handle = self.reader.layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def write_export(self, folder: Path, step: int) -> None:  # noqa: ARG002
        """`layer_<n>/width_<F>/average_l0_<l0>/params.npz`, as Gemma Scope names its files."""
        l0 = round(self.evaluate()["sae_eval/l0"])
        width = f"{self.d_sae // 1024}k" if self.d_sae % 1024 == 0 else str(self.d_sae)
        save_sae(self.autoencoder.frozen(), folder / f"layer_{self.layer}/width_{width}/average_l0_{l0}/params.npz")

    def read_export(self, folder: Path) -> None:
        self.exported = load_sae(next(folder.rglob("params.npz"))).to(self.device)
