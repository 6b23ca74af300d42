"""What training did to a model's features: `python eval.py --config-path=RUN ++mode=features`.

What the run started from (or `model.reference_path`) and the trained policy read the same held-out completions, and the
policy's own samples, and an SAE says which features each of them has at every text token. `<run>/features/` gets
`drift.parquet`, a row for each feature on each kind of text, and `report.html` (features/report.py).

One model is in memory at a time. Of its features these are kept: sums over each kind of text, the pooled features of
each completion, sparse, and the activations of the few features that the page shows.

Shape letters: S sequences, M text tokens of them, F features, K features that the page shows for a kind of text.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import models
from autoencoders.formats import sae_sections
from data import tokenise
from data.batch import batches_by_length
from dataloader import DataLoader
from distributed import parallel
from distributed.sharding import reshard
from features import neuronpedia
from launch import assembly, settings
from launch.policies import Policy, find_policy, read_unchecked, require_language_model, require_room
from launch.schema import Config
from launch.settings import RunClasses, RunPaths
from modeling.weights import Weights, load_weights, open_weights, weights_digest
from sae import ENCODE_ELEMENTS, SAE, active, attention_sinks, drift_by_feature, summed_features
from sampling import samples
from sampling.backends import TransformersBackend
from training.loop import Subject
from utils import REPO, UserError, progress_bar

FEATURES_SHOWN = 8  # features that rose most, and as many that fell most, with
CONTEXTS = 3  # their strongest contexts, of so many
BEFORE, AFTER = 16, 8  # tokens around the strongest one, after the
PROMPT_END = 40  # last tokens of the prompt
KINDS = ("chosen", "rejected", "desirable", "undesirable", "demonstrated", "sampled")
SAMPLED_BY_OTHER = "sampled by the other"  # the samples of the run that is compared with


@dataclass(frozen=True)
class Text:
    """A completion that is read, after its prompt."""

    kind: str  # one of KINDS, or SAMPLED_BY_OTHER
    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class TrainedRun:
    """A run that is looked at."""

    name: str
    loss: str
    policy: Policy


@dataclass(frozen=True)
class Figures:
    """The features of one model on one kind of text, [F] each."""

    mean: np.ndarray  # activation, a mean over the text tokens
    rate: np.ndarray  # share of the text tokens on which the feature is active
    drift: np.ndarray  # what it adds to F, a mean over the completions; of the reference 0


Profile = dict[str, Figures]  # by kind of text
Pooled = dict[tuple[str, int], Tensor]  # by kind and batch, [S, F], sparse


@dataclass(frozen=True)
class Context:
    """Text around the token where a feature is strongest, with its activation at each token under both models."""

    prompt: str  # its end
    tokens: list[str]
    reference: list[float]
    policy: list[float]
    starts: bool  # with the completion's first token
    ends: bool  # with its last

    @property
    def strength(self) -> float:
        return max(*self.reference, *self.policy)


@dataclass(frozen=True)
class Part:
    """One SAE, and where its features can be looked up."""

    name: str
    path: str
    place: str
    d_sae: int
    address: str | None


@dataclass(frozen=True)
class Measured:
    """A run's policy beside the reference, on the same texts."""

    run: TrainedRun
    reference: Profile
    policy: Profile

    def change(self, kind: str) -> np.ndarray:
        """By how much the mean activation of each feature rose, [F]."""
        return self.policy[kind].mean - self.reference[kind].mean


@dataclass(frozen=True)
class Report:
    """All that the table and the page are made from."""

    model: str
    parts: list[Part]  # whose features come one after the other
    divergence: str
    k: int
    settings: dict[str, Any]  # what else the figures depend on
    completions: dict[str, int]  # by kind of text, and the
    tokens: dict[str, int]  # text tokens that they have
    runs: list[Measured]  # the run itself, and the one it is compared with, if any
    checkpoints: dict[int, Profile]  # by examples seen; the last is the policy
    contexts: dict[str, dict[int, list[Context]]]  # by kind and feature


# ----------------------------------------------------------------------------------------------------- what is read


def data_texts(loader: DataLoader) -> list[Text]:
    """The completions that the run is evaluated on, by what the data say of them."""
    texts = []
    for index in loader.used():
        row = loader.values[index]
        if "desirable" in row:
            kinds = ["desirable" if row["desirable"] else "undesirable"]
        else:
            kinds = ["chosen", "rejected"] if len(row["completion_ids"]) == 2 else ["demonstrated"]
        texts += [Text(kind, row["prompt_ids"], ids) for kind, ids in zip(kinds, row["completion_ids"], strict=True)]
    return texts


def other_run(path: Path, own: TrainedRun, start: tuple[Path, str | None]) -> TrainedRun:
    """The run to be compared with. Raises UserError where it cannot be, feature by feature."""
    if not (path / "LATEST").exists():
        raise UserError(f"compare_to={path}: no finished run there (a run directory with LATEST)")
    config = settings.typed(read_unchecked(path, []))
    policy = find_policy(path, config, [])
    require_language_model(config, policy)
    if weights_digest(*models.reference_weights(config.model)) != weights_digest(*start):
        raise UserError(
            f"compare_to={path}: that run did not start from the same weights, so its features moved from elsewhere; "
            "++model.reference_path=... gives the run itself another reference"
        )
    name = path.resolve().name
    return TrainedRun(str(path) if name == own.name else name, config.loss.name, policy)


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The exports of a run, by the examples seen, in order."""
    found = {int(path.name.removeprefix("step-")): path for path in run.glob("step-*") if path.is_dir()}
    return dict(sorted(found.items()))


def put(policy: PreTrainedModel, weights: Weights, new_tokens: int = 0) -> None:
    """Replace the weights of a model, and put it into eval mode."""
    reshard(policy)
    load_weights(policy, weights, new_tokens)
    policy.eval()


# ----------------------------------------------------------------------------------------------------- reading it


class Reader:
    """One model after the other, in the same memory, read through the SAE on the same texts.

    Each rank has its share of the texts, and keeps it.
    """

    def __init__(self, subject: Subject, texts: Sequence[Text], *, batch_size: int, divergence: str, k: int) -> None:
        """The subject has an SAE and a tap."""
        assert subject.sae is not None and subject.tap is not None
        self.texts, self.sae, self.tap = texts, subject.sae, subject.tap
        self.policy, self.tokenizer, self.loader = subject.policy, subject.tokenizer, subject.loaders["eval"]
        self.divergence, self.k = divergence, k
        self.eos_id = subject.tokenizer.eos_token_id
        found = {text.kind for text in texts}
        self.kinds = [kind for kind in (*KINDS, SAMPLED_BY_OTHER) if kind in found]
        self.completions = {kind: sum(text.kind == kind for text in texts) for kind in self.kinds}
        self.tokens = {kind: sum(len(self.content(t)) for t in texts if t.kind == kind) for kind in self.kinds}
        world = parallel.world_size()
        size = max(1, batch_size // world)
        lengths = [len(text.prompt_ids) + len(text.completion_ids) for text in texts]
        (by_length,) = batches_by_length(lengths, len(texts))
        own = by_length[parallel.rank() :: world]  # like lengths, so that ranks that wait for each other have like work
        self.batches = {kind: in_batches([i for i in own if texts[i].kind == kind], size) for kind in self.kinds}
        self.rounds = {kind: int(parallel.max_over_ranks(len(self.batches[kind]))) for kind in self.kinds}

    def content(self, text: Text) -> list[int]:
        """The tokens of a completion that are text, as `Batch.content` has them."""
        return [token for token in text.completion_ids if token != self.eos_id]

    @torch.no_grad()
    def read(self, what: str, kinds: Sequence[str]) -> Iterator[tuple[str, int, list[int], list[int], Tensor]]:
        """The residual stream [M, D] of each of this rank's batches: with the batch's kind, number and texts, and how
        many text tokens each of them has."""
        with progress_bar(f"features {what}", sum(self.rounds[kind] for kind in kinds), 0) as advance:
            places = [(kind, number) for kind in kinds for number in range(self.rounds[kind])]
            for done, (kind, number) in enumerate(places, 1):
                own = self.batches[kind][number : number + 1]
                # A rank without a batch of its own reads one all the same: a split model runs on all ranks or on none.
                texts = [self.texts[i] for i in (own[0] if own else [0])]
                prompts, completions = [t.prompt_ids for t in texts], [[t.completion_ids] for t in texts]
                batch = self.loader.collate(prompts, completions, range(len(texts))).to(parallel.device())
                residual = models.read_residual(self.policy, batch, self.tap)
                if own:
                    yield kind, number, own[0], batch.content_lengths, residual
                advance(done, None)

    def measure(self, what: str, kinds: Sequence[str], reference: Pooled | None = None) -> tuple[Profile, Pooled]:
        """The figures of the model on some kinds of text, and its pooled features; drift is from the reference's.

        Raises UserError for features that are not finite.
        """
        sums = {kind: torch.zeros(4, self.sae.d_sae, dtype=torch.float64, device=parallel.device()) for kind in kinds}
        pooled: Pooled = {}
        for kind, number, _, lengths, residual in self.read(what, kinds):
            activations, counts = summed_features(self.sae, residual, lengths)  # [S, F]
            means = activations / counts.clamp(min=1)
            found = (activations, counts, summed_features(self.sae, residual, lengths, active)[0])
            sums[kind][:3] += torch.stack([values.double().sum(0) for values in found])
            if reference is None:
                pooled[kind, number] = means.to_sparse().cpu()
            else:
                before = reference[kind, number].to(means.device).to_dense()
                terms = drift_by_feature(self.sae, means, before, divergence=self.divergence, k=self.k)
                sums[kind][3] += terms.double().sum(0)
        profile = {}
        for kind in kinds:
            total, tokens, active_tokens, drift = parallel.sum_over_ranks(sums[kind]).numpy(force=True)
            tokens = tokens.clip(min=1)
            profile[kind] = Figures(total / tokens, active_tokens / tokens, drift / self.completions[kind])
            if not np.isfinite(profile[kind].mean).all():
                raise UserError(
                    f"{what}: features that are not finite; the weights, or model.policy_dtype, are at fault"
                )
        return profile, pooled

    def activations(self, what: str, shown: dict[str, list[int]]) -> dict[int, Tensor]:
        """For each of this rank's texts, the activations [M, K] of the features that the page shows for its kind; 0 at
        attention sinks."""
        found: dict[int, Tensor] = {}
        for kind, _, own, lengths, residual in self.read(what, list(shown)):
            latents = torch.tensor(shown[kind], dtype=torch.long, device=residual.device)
            parts = residual.split(max(1, ENCODE_ELEMENTS // self.sae.d_sae))
            sinks = torch.stack([attention_sinks(x, lengths) for x in self.sae.vectors(residual)]).any(0)
            values = torch.cat([self.sae.encode_latents(part, latents) for part in parts])
            values = values.masked_fill(sinks.unsqueeze(1), 0)
            found |= dict(zip(own, values.cpu().split(lengths)))
        return found

    def contexts(
        self, shown: dict[str, list[int]], reference: dict[int, Tensor], policy: dict[int, Tensor]
    ) -> dict[str, dict[int, list[Context]]]:
        """The strongest contexts of the features shown, over all ranks, at most one from each text."""
        own: dict[str, dict[int, list[Context]]] = {}
        for kind, latents in shown.items():
            texts = [i for batch in self.batches[kind] for i in batch if len(policy[i])]
            pairs = [torch.stack([reference[i], policy[i]]) for i in texts]  # [2, M, K]
            peaks = torch.stack([pair.amax((0, 1)) for pair in pairs]) if pairs else torch.zeros(0, len(latents))
            own[kind] = {}
            for column, latent in enumerate(latents):
                best: dict[tuple[int, ...], Context] = {}
                for place in peaks[:, column].argsort(descending=True).tolist():
                    if len(best) == CONTEXTS or peaks[place, column] <= 0:
                        break
                    text = self.texts[texts[place]]
                    if (key := tuple(text.completion_ids)) not in best:
                        best[key] = self.context(text, pairs[place][:, :, column])
                own[kind][latent] = list(best.values())
        everywhere = parallel.gather_objects(own)
        return {
            kind: {latent: strongest(found[kind][latent] for found in everywhere) for latent in latents}
            for kind, latents in shown.items()
        }

    def context(self, text: Text, values: Tensor) -> Context:
        """The context of the strongest token, from a feature's activations [2, M] under reference and policy."""
        ids, tokenizer = self.content(text), self.tokenizer
        at = int(values.amax(0).argmax())
        start, end = max(0, at - BEFORE), min(len(ids), at + AFTER + 1)
        prompt = decode(tokenizer, text.prompt_ids[-PROMPT_END:], skip_special_tokens=True)
        reference, policy = values[:, start:end].tolist()
        return Context(prompt, pieces(tokenizer, ids, start, end), reference, policy, start == 0, end == len(ids))


def in_batches(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def decode(tokenizer: Tokenizer, ids: Sequence[int], **options: bool) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False, **options))


def strongest(found: Iterable[list[Context]]) -> list[Context]:
    """The strongest of the contexts that the ranks have, no text twice."""
    ordered = sorted((context for part in found for context in part), key=lambda context: -context.strength)
    different = {"".join(context.tokens): context for context in reversed(ordered)}
    return [context for context in ordered if different["".join(context.tokens)] is context][:CONTEXTS]


def pieces(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int) -> list[str]:
    """The text of each of the tokens from start to end. A character that several tokens make is the last one's."""
    texts = [decode(tokenizer, ids[:count]).rstrip("\ufffd") for count in range(start, end + 1)]
    return [longer[len(shorter) :] for shorter, longer in pairwise(texts)]


# ----------------------------------------------------------------------------------------------------- all of it


def measure(config: Config, classes: RunClasses, path: Path, overrides: list[str]) -> tuple[Report, Path]:
    """The report on a run, and the run's directory. A killed command goes on with the samples that it has drawn.

    Raises UserError, before a weight is read, for what cannot be measured.
    """
    policy = find_policy(path, config, overrides)
    if policy.run is None or config.backend != "transformers":
        raise UserError("mode=features compares the policy of a run with its start, and has backend=transformers")
    require_language_model(config, policy)
    if not sae_sections(config.sae):
        raise UserError(
            f"mode=features reads features through an SAE, and {config.model.name} has none in this configuration: "
            "++sae.path=..., and ++sae.layer=... where its files do not say the layer"
        )
    records = samples.records_to_sample(config)
    require_room(config, policy, records)
    start = models.reference_weights(config.model)
    own = TrainedRun(policy.run.resolve().name, config.loss.name, policy)
    other = None if config.compare_to is None else other_run(Path(config.compare_to), own, start)
    paths = settings.find_paths(config, frozenset({"sae"}))
    data = assembly.load_data(config, classes, paths, splits=["eval"])
    subject = assembly.load_subject(config, classes, data, assembly.read_saes(config, paths))
    assert subject.sae is not None

    texts = data_texts(subject.loaders["eval"])
    texts += sampled_texts(config, classes, subject, records, {"sampled": own, SAMPLED_BY_OTHER: other})
    options = drift_settings(classes)
    reader = Reader(subject, texts, batch_size=config.model.eval_batch_size, **options)
    runs, checkpoints, contexts = look(reader, own, other, start)
    report = Report(
        model=config.model.name,
        parts=described_parts(config, paths, subject.sae),
        settings={
            "n_eval_examples": config.n_eval_examples,
            "n_samples": len(records),
            "samples": config.samples,
            "temperature": config.temperature,
            **dataclasses.asdict(samples.decoding_of(config)),
        },
        completions=reader.completions,
        tokens=reader.tokens,
        runs=runs,
        checkpoints=checkpoints,
        contexts=contexts,
        **options,
    )
    return report, policy.run


def drift_settings(classes: RunClasses) -> dict[str, Any]:
    """The divergence and k that drift is measured with: the loss's own, or those of loss=fpo."""
    compared: Any = classes.binding.options.get("feature_drift") or yaml.safe_load(
        (REPO / "config/loss/fpo.yaml").read_text()
    )
    return {name: compared[name] for name in ("divergence", "k")}


def sampled_texts(
    config: Config,
    classes: RunClasses,
    subject: Subject,
    records: list[dict[str, Any]],
    runs: dict[str, TrainedRun | None],
) -> list[Text]:
    """What each run's policy writes, by the kind of text. Each policy's weights in turn replace the subject's."""
    decoding, texts = samples.decoding_of(config), []
    backend = TransformersBackend(config, subject.policy, subject.tokenizer, classes.trainer.control_tokens)
    with contextlib.ExitStack() as logs:
        for kind, run in runs.items():
            if run is not None:
                template = tokenise.template_name(config, subject.tokenizer)
                identity = samples.identity_of(config, decoding, records, run.policy.digest(), template)
                assert runs["sampled"] is not None and runs["sampled"].policy.run is not None
                file = runs["sampled"].policy.run / f"features.{kind}"
                opened = logs.enter_context(samples.sample_log(file, identity, parallel.rank() == 0))
                put(subject.policy, open_weights(run.policy.folder))
                talks = samples.converse(config, decoding, records, backend, opened)
                texts += [Text(kind, list(talk.requests[0].prompt_ids), talk.answers[0].ids) for talk in talks]
    return texts


def described_parts(config: Config, paths: RunPaths, sae: SAE) -> list[Part]:
    """The SAEs that are read, as the report names them."""
    return [
        Part(
            name=where.rpartition(".")[2],
            path=str(section.path),
            place=f"layer {source.layer}, {source.hook}",
            d_sae=member.d_sae,
            address=neuronpedia.neuronpedia_url(str(section.path)),
        )
        for (where, section), source, member in zip(
            sae_sections(config.sae).items(), paths.saes, sae.members, strict=True
        )
    ]


def look(
    reader: Reader, own: TrainedRun, other: TrainedRun | None, start: tuple[Path, str | None]
) -> tuple[list[Measured], dict[int, Profile], dict[str, dict[int, list[Context]]]]:
    """The runs measured, the run's checkpoints, and the contexts of its most changed features."""
    policy = reader.policy
    new_tokens = models.tokens_to_add(models.load_config(start[0]), len(reader.tokenizer))
    put(policy, open_weights(*start), new_tokens)
    reference, pooled = reader.measure("of the reference", reader.kinds)
    kinds = [kind for kind in reader.kinds if kind != SAMPLED_BY_OTHER]
    checkpoints = {}
    last = own.policy.folder.resolve()
    for examples, folder in checkpoints_of(last.parent).items():
        if folder != last:
            put(policy, open_weights(folder))
            checkpoints[examples], _ = reader.measure(f"after {examples:,} examples", kinds, pooled)
    runs = []
    if other is not None:
        put(policy, open_weights(other.policy.folder))
        profile, _ = reader.measure(f"of {other.name}", [kind for kind in reader.kinds if kind != "sampled"], pooled)
        runs.append(Measured(other, sampled_by_other(reference), sampled_by_other(profile)))
    put(policy, open_weights(own.policy.folder))
    profile, _ = reader.measure("of the policy", kinds, pooled)
    checkpoints |= {examples: profile for examples, folder in checkpoints_of(last.parent).items() if folder == last}
    runs.insert(0, Measured(own, {kind: reference[kind] for kind in kinds}, profile))
    shown = {kind: most_changed(runs[0].change(kind)) for kind in kinds}
    after = reader.activations("of the policy, in context", shown)
    put(policy, open_weights(*start), new_tokens)
    before = reader.activations("of the reference, in context", shown)
    return runs, checkpoints, reader.contexts(shown, before, after)


def sampled_by_other(profile: Profile) -> Profile:
    """The profile of the other run: its own samples take the place of the run's samples."""
    kept = {kind: figures for kind, figures in profile.items() if kind not in ("sampled", SAMPLED_BY_OTHER)}
    return {**kept, "sampled": profile[SAMPLED_BY_OTHER]}


def most_changed(change: np.ndarray) -> list[int]:
    """The features that rose most, then those that fell most, the most changed one of either first."""
    order = change.argsort(kind="stable").tolist()
    fell = [i for i in order[:FEATURES_SHOWN] if change[i] < 0]
    rose = [i for i in reversed(order[-FEATURES_SHOWN:]) if change[i] > 0]
    return rose + fell
