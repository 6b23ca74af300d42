"""What training did to a model's features: `python eval.py --config-path=RUN ++mode=features`.

What the run started from (or `model.reference_path`) and the trained policy read the same held-out completions, and the
policy's own samples, and an SAE says which features each of them has at every text token. `<run>/features/` gets
`drift.parquet`, a row for each feature on each kind of text, and `report.html` (features/report.py).

One model is in memory at a time. Of its features these are kept: sums over each kind of text, the pooled features of
each completion, sparse, and the activations of the few features that the page shows. What needs both models at the same
token is measured on fewer completions (features/trust.py).

Shape letters: F features, G groups of prompts (features/intervals.py).
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import models
from autoencoders.formats import sae_sections
from data import tokenise
from dataloader import DataLoader
from distributed import parallel
from features import neuronpedia
from features.intervals import with_interval
from features.reading import Context, Figures, Profile, Reader, Text, put
from features.trust import Causes, Trust, causes, compare, remember
from launch import assembly, settings
from launch.policies import Policy, find_policy, read_unchecked, require_language_model, require_room
from launch.schema import Config
from launch.settings import RunClasses, RunPaths
from modeling.weights import open_weights, weights_digest
from sae import SAE
from sampling import samples
from sampling.backends import TransformersBackend
from training.loop import Subject
from utils import REPO, UserError

FEATURES_SHOWN = 8  # features that rose most, and as many that fell most
KINDS = ("chosen", "rejected", "desirable", "undesirable", "demonstrated", "sampled")
SAMPLED_BY_OTHER = "sampled by the other"  # the samples of the run that is compared with
COMPARED = 128  # completions of each kind, at most, that both models read token by token


@dataclass(frozen=True)
class TrainedRun:
    """A run that is looked at."""

    name: str
    loss: str
    policy: Policy


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

    def both(self, kind: str) -> np.ndarray:
        """The sums of the reference and the policy, [G, 2, len(SUMMED), F]."""
        return np.stack([self.reference[kind].sums, self.policy[kind].sums], axis=1)

    def errors(self, kind: str) -> dict[str, np.ndarray]:
        """The half-widths [F] of the 95 % intervals over prompts of the means and rates of reference and policy, the
        change, and what each feature adds to the drift."""
        before, after, mean = self.reference[kind].sums, self.policy[kind].sums, Figures.mean_of
        return {
            "reference": with_interval(before, mean)[1],
            "policy": with_interval(after, mean)[1],
            "reference_rate": with_interval(before, Figures.rate_of)[1],
            "policy_rate": with_interval(after, Figures.rate_of)[1],
            "change": with_interval(self.both(kind), lambda sums: mean(sums[1]) - mean(sums[0]))[1],
            "drift": with_interval(after, Figures.drift_of)[1],
        }


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
    trust: dict[str, list[Trust]]  # by kind of text, one for each SAE
    causes: Causes


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
    texts.sort(key=lambda text: (*KINDS, SAMPLED_BY_OTHER).index(text.kind))
    options = drift_settings(classes)
    reader = Reader(subject, texts, batch_size=config.model.eval_batch_size, **options)
    few = Reader(subject, spread(texts), batch_size=config.model.eval_batch_size, **options)
    seen = look(reader, few, own, other, start)
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
        **seen,
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
    texts, control = [], classes.trainer.control_tokens
    with contextlib.ExitStack() as logs:
        for kind, run in runs.items():
            if run is not None:
                assert runs["sampled"] is not None and runs["sampled"].policy.run is not None
                put(subject.policy, open_weights(run.policy.folder))
                file = runs["sampled"].policy.run / f"features.{kind}"
                talks = drawn(config, subject, records, file, run.policy.digest(), logs, control)
                texts += [Text(kind, list(talk.requests[0].prompt_ids), talk.answers[0].ids) for talk in talks]
    return texts


def drawn(
    config: Config,
    subject: Subject,
    records: list[dict[str, Any]],
    file: Path,
    digest: str,
    logs: contextlib.ExitStack,
    control: Sequence[str] = (),
) -> list[samples.Conversation]:
    """What the model writes with the weights that it has, whose `digest` is given. Until the end of `logs` the samples
    are kept beside `file`, so that a killed command goes on with them."""
    decoding, template = samples.decoding_of(config), tokenise.template_name(config, subject.tokenizer)
    backend = TransformersBackend(config, subject.policy, subject.tokenizer, control)
    identity = samples.identity_of(config, decoding, records, digest, template)
    log = logs.enter_context(samples.sample_log(file, identity, parallel.rank() == 0))
    return samples.converse(config, decoding, records, backend, log)


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


def spread(texts: Sequence[Text]) -> list[Text]:
    """At most COMPARED completions of each kind but the other run's samples, evenly spread: of a pair both or none."""
    found = []
    for kind in KINDS:
        own = [text for text in texts if text.kind == kind]
        found += [own[place * len(own) // COMPARED] for place in range(COMPARED)] if len(own) > COMPARED else own
    return found


def look(
    reader: Reader, few: Reader, own: TrainedRun, other: TrainedRun | None, start: tuple[Path, str | None]
) -> dict[str, Any]:
    """By their names in the report: the runs measured, the run's checkpoints, the contexts of its most changed
    features, and how far all that is to be trusted, from the `few` completions."""
    policy = reader.policy
    new_tokens = models.tokens_to_add(models.load_config(start[0]), len(reader.tokenizer))
    put(policy, open_weights(*start), new_tokens)
    reference, pooled = reader.measure("of the reference", reader.kinds)
    remembered = remember(few)
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
    compared = compare(few, remembered, shown)
    caused = causes(few, remembered, sorted({latent for latents in shown.values() for latent in latents}))
    put(policy, open_weights(*start), new_tokens)
    before = reader.activations("of the reference, in context", shown)
    contexts = reader.contexts(shown, before, after)
    return {"runs": runs, "checkpoints": checkpoints, "contexts": contexts, "trust": compared, "causes": caused}


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
