"""Training sparse autoencoders on the residual stream of a model, which stays as it is: `loss=sae`; saved ones further
(`loss=sae-finetune`); and on the difference between the residual streams of two models (`loss=sae-difference`).

BatchTopK (Bussmann et al. 2024, 2412.06410): of a step of M tokens the k * M largest pre-activations stay. The
threshold that this amounts to becomes that of a JumpReLU, which is what is evaluated and saved, in Gemma Scope's
layout. `activations.py` makes the steps; here are the autoencoder, its loss, and what is measured and saved.

Shape letters: M tokens of text, D width of the residual stream, F latents, P pairs of a token and a latent that stays.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoders.activations import ActivationLoader, Activations, text_positions
from autoencoders.formats import load_sae, save_sae, save_saelens
from data.batch import Batch
from distributed import parallel
from modeling.attention import whole_blocks
from models import decoder_layers, final_hidden_states, make_tap, score
from sae import ENCODE_ELEMENTS, SAE, MLPTap, attention_sinks
from training.loop import BasicTrainer, Setup, warmup_of
from training.metrics import MetricAccumulator
from training.quantities import Binding
from training.reference import LiveReference
from training.settings import TrainingSettings
from training.throughput import ThroughputMeter
from utils import Count, Natural, NonNegative, UserError, console

SAMPLE_STEPS = 16  # whose tokens stand for all: where training starts, and the thresholds, are set from them
MEDIAN_STEPS = 32  # of Weiszfeld's algorithm


class BatchTopK(nn.Module):
    """The autoencoder in training. It sees inputs scaled to unit mean square and has unit-norm decoder rows."""

    scale: Tensor  # [] multiplies the residual stream
    mean: Tensor  # [D] of scaled inputs, which FVU is measured around
    threshold: Tensor  # [] the JumpReLU's, of scaled inputs, less
    offset: Tensor | None  # [F] the thresholds of an SAE that training starts from
    silent: Tensor  # [F] training tokens since the latent last fired

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        auxiliary: float,
        dead_after: int,
        seed: int,
        groups: Sequence[int] = (),
        start: SAE | None = None,
    ) -> None:
        """`groups` are numbers of latents: so many of the first ones also have to reconstruct by themselves. `start`
        is an SAE that training starts from, once `start_from` has seen activations."""
        super().__init__()
        self.k, self.auxiliary, self.dead_after = k, auxiliary, dead_after
        self.groups, self.start = groups, start
        rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.Parameter(F.normalize(rows, dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("offset", None if start is None else torch.zeros(d_sae))
        self.register_buffer("silent", torch.zeros(d_sae))

    @torch.no_grad()
    def start_from(self, x: Tensor, tokens: int) -> None:
        """Take the scale, the mean and, as the decoder's bias, the geometric median of vectors: [M, D] of this rank,
        so many `tokens` over all. With an SAE to start from, all but the scale and the mean are the SAE's."""
        self.scale.copy_(parallel.sum_over_ranks(x.square().sum() / x.shape[1] / tokens).rsqrt())
        x = x * self.scale
        self.mean.copy_(parallel.sum_over_ranks(x.sum(0) / tokens))
        if self.start is not None:
            self.take(self.start)
            return
        median = self.mean.clone()
        for _ in range(MEDIAN_STEPS):
            weight = 1 / (x - median).norm(dim=1).clamp(min=1e-6)
            sums = parallel.sum_over_ranks(torch.cat([weight @ x, weight.sum()[None]]))
            median = sums[:-1] / sums[-1]
        self.b_dec.copy_(median)

    @torch.no_grad()
    def take(self, sae: SAE) -> None:
        """Become an SAE: `frozen` gives it back, but for the norm of its decoder rows, which goes into its features."""
        device = self.W_dec.device
        norms = sae.W_dec.to(device).norm(dim=1)
        self.W_dec.copy_(F.normalize(sae.W_dec.to(device), dim=1))
        self.W_enc.copy_(sae.W_enc.to(device) * norms)
        self.b_dec.copy_(sae.b_dec * self.scale)
        self.b_enc.copy_(sae.b_enc.to(device) * norms * self.scale + self.b_dec @ self.W_enc)
        assert self.offset is not None
        self.offset.copy_(sae.threshold.to(device).clamp(min=0) * norms * self.scale)

    def preactivations(self, x: Tensor) -> Tensor:
        """[M, F] of scaled inputs [M, D]. The bias is taken out of W_enc's product, where it costs next to nothing."""
        return (x @ self.W_enc + (self.b_enc - self.b_dec @ self.W_enc)).relu()

    def decode(self, latents: Tensor, values: Tensor, starts: Tensor | None = None) -> Tensor:
        """Sums [M, D] of decoder rows: token i's latents and their values are [i] of both, or begin at `starts[i]`."""
        return F.embedding_bag(latents, self.W_dec, starts, mode="sum", per_sample_weights=values)

    @torch.no_grad()
    def smallest_kept(self, pre: Tensor, tokens: int) -> Tensor:
        """The smallest [] of the k * tokens largest pre-activations of a step, over all ranks; each less its offset."""
        count = self.k * tokens
        above = pre if self.offset is None else pre - self.offset
        own = above.flatten().topk(min(count, pre.numel()), sorted=False).values
        if parallel.world_size() > 1:
            own = parallel.gather_over_ranks(F.pad(own, (0, count - len(own))))
            own = own.topk(count, sorted=False).values
        return own.min()

    @torch.no_grad()
    def note_silence(self, kept: Tensor, tokens: int) -> None:
        """Count the tokens that each latent was silent for, after a step in which `kept` [M, F] stayed."""
        fired = parallel.sum_over_ranks(kept.any(0).float()) > 0
        self.silent.add_(tokens).masked_fill_(fired, 0)

    def thresholds(self, common: Tensor) -> Tensor:
        """[] or [F]: from a threshold that is common to all latents, that of each."""
        return common if self.offset is None else common + self.offset

    def forward(self, x: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of scaled inputs [M, D] of this rank, in a step of so many tokens over all: squared errors [M] summed over
        D, in units of the scaled input; the same of the groups, summed; the auxiliary loss [M]; how many latents [M]
        are active; and dead ones [F].

        Each group of the first latents reconstructs alone (Matryoshka; Bussmann et al. 2025, 2503.17547), so that the
        first ones stay general. The auxiliary loss revives latents that were silent for `dead_after` tokens: the D / 2
        strongest of them for each token reconstruct what the others left over, without the bias (Gao et al. 2024,
        2406.04093, A.2).
        """
        pre = self.preactivations(x)
        kept = (pre >= self.thresholds(self.smallest_kept(pre, tokens))) & (pre > 0)
        self.note_silence(kept, tokens)
        active = kept.sum(1)
        token, latent = kept.nonzero(as_tuple=True)  # [P]
        values = pre[token, latent]
        error = x - self.decode(latent, values, active.cumsum(0) - active) - self.b_dec
        losses, nested, auxiliary = error.square().sum(1), x.new_zeros(len(x)), x.new_zeros(len(x))
        for size in self.groups:
            inside, own = latent < size, kept[:, :size].sum(1)
            rebuilt = self.decode(latent[inside], values[inside], own.cumsum(0) - own) + self.b_dec
            nested = nested + (x - rebuilt).square().sum(1)
        dead = self.silent > self.dead_after
        candidates = dead.nonzero().flatten()
        if len(candidates):
            strongest = pre[:, candidates].topk(min(len(candidates), x.shape[1] // 2), sorted=False)
            revived = self.decode(candidates[strongest.indices], strongest.values)
            auxiliary = (error.detach() - revived).square().sum(1)
        return losses, nested, auxiliary, active, dead

    def frozen(self) -> SAE:
        """The same autoencoder as a JumpReLU on unscaled inputs; its decoder rows keep unit norm."""
        return SAE(
            W_enc=self.W_enc,
            b_enc=(self.b_enc - self.b_dec @ self.W_enc) / self.scale,
            W_dec=self.W_dec,
            b_dec=self.b_dec / self.scale,
            threshold=(self.thresholds(self.threshold) / self.scale).expand(len(self.W_dec)).clone(),
        )

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """Take out of the decoder's gradient what would only change its rows' norm."""
        if self.W_dec.grad is not None:
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def keep_unit_rows(self) -> None:
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))


class SAETrainer(BasicTrainer):
    """Trains a `BatchTopK` for each of some layers (null: the last), all from the same forward passes.

    The optimiser's steps are of `batch_tokens` text tokens, drawn from a buffer of `buffer_tokens` (`activations.py`);
    `model.batch_size` is only what the model reads at once.
    """

    trains_policy = can_plan = False
    can_grow = False  # more records make other blocks, so other steps
    saved_in = ""  # a folder of the export, for what does not read the residual stream itself

    def __init__(
        self,
        setup: Setup,
        *,
        layer: Natural | list[Natural] | None,
        d_sae: Count,
        k: Count,
        groups: list[Count] | None,
        batch_tokens: Count,
        buffer_tokens: Count,
        dead_after: Count,
        auxiliary: NonNegative,
        saelens: bool,
    ) -> None:
        """Raises UserError for layers that the model has not, and for a warm-up that the run is too short for."""
        count = len(decoder_layers(setup.policy, setup.config.model.block_name))
        layers = [count - 1] if layer is None else [layer] if isinstance(layer, int) else list(layer)
        if wrong := [n for n in layers if not 0 <= n < count]:
            raise UserError(f"loss.layer={wrong[0]}: the model has layers 0 to {count - 1}")
        width, seed = setup.policy.config.get_text_config().hidden_size, setup.config.seed
        own: dict[str, Any] = {"auxiliary": auxiliary, "dead_after": dead_after, "groups": groups or ()}
        autoencoders = {n: BatchTopK(width, d_sae, k, **own, seed=1000 * seed + n) for n in layers}
        self.prepare(setup, autoencoders, batch_tokens, buffer_tokens, saelens=saelens)

    def prepare(
        self, setup: Setup, autoencoders: dict[int, BatchTopK], batch_tokens: int, buffer_tokens: int, *, saelens: bool
    ) -> None:
        """Make what trains autoencoders, each on the output of its layer. Raises UserError for a warm-up that the run
        is too short for."""
        self.layers, self.autoencoders = list(autoencoders), list(autoencoders.values())
        self.modules = decoder_layers(setup.policy, setup.config.model.block_name)
        self.names = [f"layer_{n}/" if len(self.layers) > 1 else "" for n in self.layers]  # in those of metrics
        setup.policy.requires_grad_(False).eval()
        places = [(n, "residual") for n in self.layers]
        self.reader = make_tap(setup.policy, places, setup.config.model.block_name)
        tokenizer, self.saelens = setup.tokenizer, saelens
        self.special = [i for i in {tokenizer.bos_token_id, tokenizer.eos_token_id} if i is not None]
        self.exported: list[SAE] = []
        self.batch_tokens, self.buffer_tokens = batch_tokens, buffer_tokens
        sizes = {"batch_tokens": batch_tokens, "buffer_tokens": buffer_tokens}
        self.stream = ActivationLoader(setup.loaders["train"], self.residuals, special=self.special, **sizes)
        steps = len(self.stream)
        warmup = warmup_of(setup.config, steps)
        if 5 * warmup > 4 * steps:
            raise UserError(
                f"warmup_steps={warmup}: the run has {steps:,} steps of about {batch_tokens:,} text tokens, and in the "
                f"last fifth of them the learning rate goes down; warmup_steps={steps // 10} would do, or more data"
            )
        super().__init__(replace(setup, loaders={**setup.loaders, "train": self.stream}))  # type: ignore[dict-item]

    def start_optimizer(self) -> None:
        super().start_optimizer()
        self.optimizer.register_step_post_hook(lambda *_: self.keep_unit_rows())

    @classmethod
    def check(cls, config: TrainingSettings, binding: Binding) -> None:
        options = binding.options["init"]
        if config.model.layout == "shared_prefix":
            raise UserError(
                "model.layout=shared_prefix: would count a prompt's tokens once for several completions; packed"
            )
        layers, latents = options.get("layer"), options.get("d_sae")
        if isinstance(layers, list) and (not layers or len(set(layers)) < len(layers)):
            raise UserError(f"loss.layer={layers}: a layer's number from 0, a list of different ones, or null")
        if latents is not None and options["k"] > latents:
            raise UserError(f"loss.k={options['k']}: more than the loss.d_sae={latents} latents that there are")
        if (groups := options.get("groups")) and sorted({*groups, latents}) != [*groups, latents]:
            raise UserError(
                f"loss.groups={groups}: numbers of the first latents, each larger than the one before and smaller "
                f"than loss.d_sae={latents}; all latents together are always trained"
            )

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        layers = binding.options["init"].get("layer")
        names = [f"layer_{n}/" for n in layers] if isinstance(layers, list) and len(layers) > 1 else [""]
        figures = ("l0", "fvu", "ce_recovered", "ce_clean", "ce_sae", "ce_zero", "dead")
        return ["loss/eval", "sae_eval/left_out", *(f"sae_eval/{name}{key}" for name in names for key in figures)]

    # ------------------------------------------------------------------------------------------------ reading

    @torch.no_grad()
    def residuals(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The residual stream [M, layers * D] at a batch's text tokens, and which of them [M] are trained on."""
        batch = whole_blocks(self.policy, batch.to(self.device))
        with self.reader.reading():
            final_hidden_states(self.policy, batch)
        where = text_positions(batch, self.special)
        x = self.reader.take()[where]
        return x - self.rest(batch, where, x), self.kept(batch, where, x)

    def rest(self, batch: Batch, where: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """What of the vectors x [M, layers * D], at text tokens `where` [R, T], is not to be reconstructed: nothing."""
        return torch.zeros((), device=x.device, dtype=x.dtype)

    def kept(self, batch: Batch, where: Tensor, x: Tensor) -> Tensor:
        """Which [M] of the vectors x [M, layers * D] at the text tokens `where` [R, T] are trained on and measured: all
        but those of a text's first token, which without BOS is an attention sink, and of other sinks in any layer."""
        sinks = batch.position_ids[where] == 0
        lengths = batch.document[where].bincount().tolist()
        for part in x.chunk(len(self.layers), dim=1):
            sinks |= attention_sinks(part, lengths)
        return ~sinks

    def by_layer(self, x: Tensor) -> Iterator[Tensor]:
        """The vectors [M, D] of each layer, in fp32."""
        return (part.float() for part in x.chunk(len(self.layers), dim=1))

    # ------------------------------------------------------------------------------------------------ training

    def steps(self, split: str, start: int = 0) -> Iterator[list[Batch]]:
        """Not in a thread of their own, as other trainers': the model that makes them is the one that evaluates."""
        return self.loaders[split].steps(start)

    def trained_module(self) -> nn.Module:
        return nn.ModuleList(self.autoencoders).to(self.device)

    def train(self) -> None:
        """As every trainer; a new run starts from the statistics of its first activations."""
        console.print(
            f"{self.stream.tokens:,} text tokens in {len(self.stream):,} steps of about "
            f"{self.batch_tokens:,}, from a buffer of about {self.buffer_tokens:,}"
        )
        if not self.run.place:
            self.stream.fill(0)
            sample = self.stream.in_buffer(SAMPLE_STEPS)
            vectors, tokens = torch.cat([step.x for step in sample]), sum(step.tokens for step in sample)
            for own, x in zip(self.autoencoders, self.by_layer(vectors)):
                own.start_from(x, tokens)
            if left_out := sum(self.stream.left_out):
                share = left_out / len(self.stream.buffer)
                console.print(f"about {share:.2%} of them are left out: first tokens without BOS, and attention sinks")
        super().train()

    @torch.no_grad()
    def set_thresholds(self) -> None:
        """Set each JumpReLU's threshold so that with the weights as they are k latents a token are active on average.

        It is what BatchTopK comes down to on steps of the block in the buffer, a mean over them. (The paper's running
        mean over training lags behind the weights, by much in a short run, and L0 is then not k.)
        """
        found = [
            [
                own.smallest_kept(own.preactivations(x * own.scale), step.tokens)
                for own, x in zip(self.autoencoders, self.by_layer(step.x))
            ]
            for step in self.stream.in_buffer(SAMPLE_STEPS)
        ]
        for own, smallest in zip(self.autoencoders, zip(*found)):  # none where a finished run is resumed
            own.threshold.copy_(torch.stack(smallest).mean())

    def save(self, step: int, examples: int) -> None:
        self.set_thresholds()
        super().save(step, examples)

    def loss(self) -> None:
        """Not a loss of log-probabilities: see `compute_loss`."""

    def weight(self, batch: Activations) -> int:  # type: ignore[override]
        return len(batch.x)

    def records(self, batch: Activations) -> int:  # type: ignore[override]
        return self.weight(batch)

    def compute_loss(  # type: ignore[override]
        self, batch: Activations, split: str, means: MetricAccumulator, _per_record: float = 1.0
    ) -> Tensor:
        """Losses [M] of the tokens, summed over the layers."""
        losses, errors = batch.x.new_zeros(2, len(batch.x), dtype=torch.float32)
        for own, name, x in zip(self.autoencoders, self.names, self.by_layer(batch.x)):
            x = x * own.scale
            squared, nested, revival, active, dead = own(x, batch.tokens)
            errors, losses = errors + squared, losses + squared + nested + own.auxiliary * revival
            means.add(f"sae_{split}/{name}l0", active)
            means.add(f"sae_{split}/{name}fvu", squared, float((x - own.mean).square().sum()))
            means.add(f"sae_{split}/{name}dead", dead)
        left_out = errors.new_tensor(batch.left_out)
        means.add(f"sae_{split}/left_out", left_out, len(batch.x) + batch.left_out)
        means.add(f"loss/{split}", errors)
        return losses

    def keep_unit_rows(self) -> None:
        for own in self.autoencoders:
            own.keep_unit_rows()

    def clip_gradients(self) -> Tensor:
        """Each autoencoder's by itself, so that it is trained as it would be alone; gives the norm of all together."""
        norms = []
        for own in self.autoencoders:
            own.drop_parallel_gradient()
            norms.append(self.clip(own, self.config.model.max_grad_norm))
        return torch.stack(norms).norm()

    def count(self, pace: ThroughputMeter, step: int, micro_batches: list[Activations]) -> None:  # type: ignore[override]
        tokens = sum(map(self.weight, micro_batches))
        products = sum(own.W_enc.numel() for own in self.autoencoders)  # in the forward and in the backward pass
        operations = tokens * (pace.flops.per_token / 3 + 4 * products)
        pace.count(tokens, self.stream.records_in(step) / parallel.world_size(), operations)

    def headline(self, values: dict[str, float]) -> str:
        shown = {key.removeprefix("sae_train/"): value for key, value in values.items() if key.startswith("sae_train/")}
        return "  ".join(f"{name} {value:.3g}" for name, value in shown.items())

    # ------------------------------------------------------------------------------------------------ measuring

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of each frozen JumpReLU on the evaluation set: L0 (active latents a token), FVU (squared error over the
        variance around the mean of each dimension), CE recovered (how much of the loss between zeroing what it reads
        and leaving it alone the reconstruction wins back) and the share of dead latents. The loss is the squared error
        in units of the vectors' mean square, summed over layers. All are of the tokens that `kept` names; at the
        others the residual stream stays as it is."""
        self.set_thresholds()
        saes = self.exported or [own.frozen() for own in self.autoencoders]
        clean = torch.zeros(4, dtype=torch.float64, device=self.device)  # tokens: text, kept, of completions; CE
        sums = torch.zeros(len(saes), 5, dtype=torch.float64, device=self.device)  # L0, error, squares, CEs: SAE, zero
        means = torch.zeros(len(saes), saes[0].d_in, dtype=torch.float64, device=self.device)
        for micro_batches in self.steps("eval"):
            self.stop_if_asked()
            for batch in (whole_blocks(self.policy, batch.to(self.device)) for batch in micro_batches):
                where = text_positions(batch, self.special)
                with self.reader.reading():
                    own = self.cross_entropy(batch)
                vectors = self.reader.take()[where]
                kept = self.kept(batch, where, vectors)
                rest = self.rest(batch, where, vectors).expand_as(vectors)[kept]
                clean += torch.stack([where.sum(), kept.sum(), own.new_tensor(len(batch.target)), own])
                where, vectors = where.masked_scatter(where, kept), vectors[kept]
                for n, (x, other) in enumerate(zip(self.by_layer(vectors - rest), self.by_layer(rest))):
                    rebuilt, active = reconstruct(saes[n], x)
                    values = [active, (x - rebuilt).square().sum(), x.square().sum()]
                    for replacement in (rebuilt + other, other):
                        with self.replaced(self.layers[n], where, replacement):
                            values.append(self.cross_entropy(batch))
                    sums[n] += torch.stack(values)
                    means[n] += x.double().sum(0)
        text, tokens, targets, ce_clean = parallel.sum_over_ranks(clean).tolist()
        parallel.sum_over_ranks(sums)
        variances = sums[:, 2] - parallel.sum_over_ranks(means).square().sum(1) / tokens
        found = {"loss/eval": float((sums[:, 1] / sums[:, 2]).sum()) * saes[0].d_in}
        found["sae_eval/left_out"] = 1 - tokens / text
        for n, (trained, name) in enumerate(zip(self.autoencoders, self.names)):
            active, error, _, ce_sae, ce_zero = sums[n].tolist()
            figures = {
                "l0": active / tokens,
                "fvu": error / float(variances[n]),
                "ce_recovered": (ce_zero - ce_sae) / (ce_zero - ce_clean),
                "ce_clean": ce_clean / targets,
                "ce_sae": ce_sae / targets,
                "ce_zero": ce_zero / targets,
            }
            if not self.exported:  # a saved file does not say
                figures["dead"] = float((trained.silent > trained.dead_after).float().mean())
            found |= {f"sae_eval/{name}{key}": value for key, value in figures.items()}
        return found

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Of a batch's completion tokens, summed."""
        return -score(self.policy, batch).logps.double().sum()

    @contextmanager
    def replaced(self, layer: int, where: Tensor, vectors: Tensor) -> Iterator[None]:
        """Forward passes in which a layer's output at some positions [R, T] is replaced by vectors [M, D]."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            residual = output if isinstance(output, Tensor) else output[0]
            changed = residual.clone()
            changed[where] = vectors.to(residual.dtype)
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        handle = self.modules[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    # ------------------------------------------------------------------------------------------------ saving

    def write_export(self, folder: Path, step: int) -> None:  # noqa: ARG002
        """`layer_<n>/width_<F>/average_l0_<l0>/params.npz`, as Gemma Scope names its files, and in `saelens/` beside
        it, where that was asked for, the same as SAELens has it."""
        figures = self.evaluate()
        if parallel.rank() != 0:
            return
        for number, own, name in zip(self.layers, self.autoencoders, self.names):
            l0 = round(figures[f"sae_eval/{name}l0"])
            place = folder / self.saved_in / f"layer_{number}/width_{width_name(len(own.W_dec))}/average_l0_{l0}"
            save_sae(own.frozen(), place / "params.npz")
            if self.saelens:
                model = str(self.config.model.name_or_path)
                data = {"dataset_path": ",".join(map(str, self.config.datasets)), "k": own.k}
                save_saelens(own.frozen(), place / "saelens", number, {"model_name": model, **data})

    def is_export_as_wanted(self, folder: Path) -> bool:
        return folder.is_dir()

    def read_export(self, folder: Path) -> None:
        files = [next((folder / self.saved_in).glob(f"layer_{number}/*/*/params.npz")) for number in self.layers]
        self.exported = [load_sae(file).to(self.device) for file in files]


class SAEFineTuner(SAETrainer):
    """Trains the SAEs that `sae` names further, on the activations of the model at hand.

    Each begins as it is (`BatchTopK.take`), with a threshold for each latent; the steps move all of them together, so
    that k latents a token are active on average.
    """

    needs = frozenset({"sae"})

    def __init__(
        self,
        setup: Setup,
        *,
        k: Count | None,
        batch_tokens: Count,
        buffer_tokens: Count,
        dead_after: Count,
        auxiliary: NonNegative,
        saelens: bool,
    ) -> None:
        """`k` null: as many latents as the SAE has active. Raises UserError for an SAE of another place than the
        residual stream, and for two of one layer."""
        assert setup.sae is not None and setup.tap is not None
        modules = list(decoder_layers(setup.policy, setup.config.model.block_name))
        autoencoders: dict[int, BatchTopK] = {}
        for sae, tap in zip(setup.sae.members, setup.tap.members):
            layer = modules.index(tap.layer)
            if isinstance(tap, MLPTap) or layer in autoencoders:
                raise UserError("loss=sae-finetune: takes SAEs of the residual stream, one for each layer")
            own: dict[str, Any] = {"auxiliary": auxiliary, "dead_after": dead_after, "seed": 0, "start": sae}
            autoencoders[layer] = BatchTopK(sae.d_in, sae.d_sae, k or 0, **own)
            if k is not None and k > sae.d_sae:
                raise UserError(f"loss.k={k}: more than the {sae.d_sae} latents of the SAE of layer {layer}")
        self.prepare(setup, autoencoders, batch_tokens, buffer_tokens, saelens=saelens)

    def train(self) -> None:
        """As every trainer; a `k` that is open is the L0 of the first activations. A resumed run reads them again."""
        if any(own.k == 0 for own in self.autoencoders):
            self.stream.fill(0)
            sample = self.stream.in_buffer(SAMPLE_STEPS)
            tokens = sum(step.tokens for step in sample)
            vectors = self.by_layer(torch.cat([step.x for step in sample]))
            for layer, own, x in zip(self.layers, self.autoencoders, vectors):
                assert own.start is not None
                l0 = float(parallel.sum_over_ranks(reconstruct(own.start, x)[1])) / tokens
                own.k = max(1, round(l0))
                console.print(f"layer {layer}: the SAE has {l0:.1f} latents active a token here, so loss.k={own.k}")
        super().train()


class DifferenceSAETrainer(SAETrainer):
    """Trains on what sets the model apart from that of `model.reference_path`: its residual stream less the other's, at
    the same tokens (diff-SAE; Minder et al. 2025, 2504.02922, on why BatchTopK suits it)."""

    needs = frozenset({"live_reference"})
    saved_in = "difference"

    def prepare(self, setup: Setup, autoencoders: dict[int, BatchTopK], *sizes: int, saelens: bool) -> None:
        """Raises UserError for another model whose layers do not fit as well."""
        self.other = next(own.model for own in setup.references.values() if isinstance(own, LiveReference))
        block = setup.config.model.block_name
        shapes = [
            (len(decoder_layers(model, block)), model.config.get_text_config().hidden_size)
            for model in (setup.policy, self.other)
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"model.reference_path={setup.config.model.reference_path}: {shapes[1][0]} layers of width "
                f"{shapes[1][1]}, where the model has {shapes[0][0]} of width {shapes[0][1]}"
            )
        self.other_reader = make_tap(self.other, [(n, "residual") for n in autoencoders], block)
        super().prepare(setup, autoencoders, *sizes, saelens=saelens)

    @classmethod
    def check(cls, config: TrainingSettings, binding: Binding) -> None:
        super().check(config, binding)
        if config.model.reference_path is None:
            raise UserError("loss=sae-difference: model.reference_path has to name the other model")

    def rest(self, batch: Batch, where: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """The other model's vectors."""
        with self.other_reader.reading():
            final_hidden_states(self.other, batch)
        return self.other_reader.take()[where]


def reconstruct(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [M, D] as an SAE gives them back, and how many features are active in all; some of them at a time."""
    rebuilt, active = [x.new_zeros(0, x.shape[1], dtype=torch.float32)], torch.zeros((), device=x.device)
    for part in x.split(max(1, ENCODE_ELEMENTS // sae.d_sae)):
        features = sae.encode(part)
        rebuilt.append(sae.decode(features))
        active = active + (features > 0).sum()
    return torch.cat(rebuilt), active


def width_name(d_sae: int) -> str:
    """As Gemma Scope writes it: 16k for 16,384."""
    return f"{d_sae // 1024}k" if d_sae % 1024 == 0 else str(d_sae)
