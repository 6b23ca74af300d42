"""What training did to behaviour, beside what the pairs foretold: a part of `mode=features ++data=` on a finished run.

The outcome is the mean pooled feature of samples that the policy draws for held-out prompts, less that of samples that
the start draws, both read by the start. Two estimates of it, and what noise alone gives:

- drawn: from samples of both. They share their random numbers, so what training left as it was is drawn alike.
- reweighted: from the start's samples alone, each weighing exp(log policy - log start), over the sum of the weights.
- null: two draws from the start.

Shape letters: S samples, F features, Q = F + 1 quantities, the last of which is the length, G groups of prompts.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from distributed import parallel
from features.intervals import with_interval
from features.measure import drawn
from features.reading import Reader, Text, put
from features.trust import Estimate, estimates
from launch.policies import Policy, find_policy, require_room, run_of, trainer_class
from launch.schema import Config
from modeling.weights import open_weights, weights_digest
from sae import pooled_features
from sampling import samples
from training.loop import Subject
from utils import UserError, console

KINDS = ("policy", "start", "start again")
LEAST_ACTIVE = 0.01  # a feature that is active in fewer of the samples is left out
LEAST_EFFECTIVE = 0.1  # of the samples, as effective sample size; with fewer, reweighting says nothing
SPLITS = 20  # of the prompts into halves, for the noise ceiling
RESAMPLES = 500  # of the features, for intervals over features


@dataclass(frozen=True)
class Finished:
    """A finished run, and the prompts that its policy and its start are to answer."""

    config: Config
    policy: Policy
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Fit:
    """How well Delta accounts for an estimate of the outcome, over features."""

    name: str  # drawn, reweighted or null
    r2: Estimate  # Pearson's r, squared; the interval is over held-out prompts,
    r2_features: tuple[float, float]  # this one over features, from low to high
    rank: Estimate  # Spearman's correlation
    rank_features: tuple[float, float]
    ceiling: float  # the R2 that noise leaves possible


@dataclass(frozen=True)
class Outcome:
    """What training did, beside Delta."""

    prompts: int
    samples: int  # each estimate is of so many, and as many others
    features: int  # that are compared
    effective: float  # effective sample size of the reweighted samples, as a share of them
    left_out: str  # why nothing is reweighted; empty where it is
    fits: list[Fit]
    shown: str  # the estimate with the highest ceiling
    compared: np.ndarray  # [F] which features are
    columns: dict[str, np.ndarray]  # [Q] each, by the table's names

    @property
    def best(self) -> Fit:
        return next(fit for fit in self.fits if fit.name == self.shown)


def finished(config: Config, path: Path, overrides: list[str]) -> Finished | None:
    """What the command line names, where that is a finished run of a language model.

    Raises UserError, before a weight is read, where its policy cannot be sampled from.
    """
    run = run_of(path)
    if run is None or not (run / "LATEST").exists():
        return None
    policy = find_policy(path, config, overrides)
    if policy.run is None or not policy.writes_text():
        return None
    if trainer_class(config).control_tokens:
        console.print(f"loss={config.loss.name} writes after a control token: its samples are not compared with pairs")
        return None
    if config.backend != "transformers":
        raise UserError("mode=features samples from a finished run in this process: backend=transformers")
    records = samples.records_to_sample(config)
    require_room(config, policy, records)
    return Finished(config, policy, records)


# ------------------------------------------------------------------------------------------------------ the samples


def measure_outcome(run: Finished, subject: Subject, figures: dict[str, np.ndarray]) -> Outcome:
    """Draw, read and compare with the `figures` [Q] of the pairs. The subject's weights are replaced."""
    config, model, start = run.config, subject.policy, models.reference_weights(run.config.model)
    new_tokens = models.tokens_to_add(models.load_config(start[0]), len(subject.tokenizer))
    twice = config.model_copy(update={"samples": 2 * config.samples})
    assert run.policy.run is not None
    with ExitStack() as logs:  # a killed command goes on with what it has drawn
        put(model, open_weights(run.policy.folder))
        file = run.policy.run / "features.outcome"
        talks = drawn(config, subject, run.records, file, run.policy.digest(), logs)
        put(model, open_weights(*start), new_tokens)
        file = run.policy.run / "features.start"
        talks_of_start = drawn(twice, subject, run.records, file, weights_digest(*start), logs)
        texts = [Text(KINDS[0], list(talk.requests[0].prompt_ids), talk.answers[0].ids) for talk in talks]
        for kind, again in zip(KINDS[1:], (False, True)):
            own = [talk for talk in talks_of_start if (talk.draw >= config.samples) == again]
            texts += [Text(kind, list(talk.requests[0].prompt_ids), talk.answers[0].ids) for talk in own]
    reader = Reader(subject, texts, batch_size=config.model.eval_batch_size)
    sums, pooled, before = read_by_start(reader)
    put(model, open_weights(run.policy.folder))
    after = scored(reader, "scored by the policy")
    weighted, effective = reweighted(reader, pooled, before, after)
    put(model, open_weights(*start), new_tokens)
    whole = (config.temperature, config.top_p, config.top_k) == (1, 1, 0)
    left_out = "" if whole else "samples have to be of the whole distribution: temperature 1, top_p 1, top_k 0"
    if whole and effective < LEAST_EFFECTIVE:
        left_out = f"an effective sample size of {effective:.1%} of the samples is too small, so they are drawn anew"
    sizes = len(run.records), reader.completions["start"]
    return outcome_of(np.concatenate([sums, weighted], axis=1), figures, effective, left_out, *sizes)


@torch.no_grad()
def read_by_start(reader: Reader) -> tuple[np.ndarray, dict[tuple[str, int], Tensor], dict[tuple[str, int], Tensor]]:
    """Sums [G, 9, Q] of the samples' quantities, how many samples that is, and in how many each is above zero, for
    each of KINDS; by kind and batch the start's samples' quantities [S, Q], sparse, and log-probabilities [S]."""
    width = reader.sae.d_sae + 1
    kinds = {kind: number for number, kind in enumerate(KINDS)}
    sums = torch.zeros(reader.groups[KINDS[0]], 9, width, dtype=torch.float64, device=parallel.device())
    pooled, logps = {}, {}
    for kind, number, own, batch in reader.batched("of samples", reader.kinds):
        scores = models.score(reader.policy, batch, reader.tap)
        assert scores.residual is not None
        if not own:
            continue
        features = pooled_features(reader.sae, scores.residual, batch.read_lengths)
        quantities = torch.cat([features, scores.lengths.float()[:, None]], dim=1)
        rows = torch.stack([quantities, torch.ones_like(quantities), (quantities > 0).float()], dim=1)
        place = 3 * kinds[kind]
        sums[:, place : place + 3].index_add_(0, reader.groups_at(own), rows.double())
        if kind != KINDS[0]:
            pooled[kind, number], logps[kind, number] = quantities.to_sparse().cpu(), scores.logps.cpu()
    return parallel.sum_over_ranks(sums).numpy(force=True), pooled, logps


@torch.no_grad()
def scored(reader: Reader, what: str) -> dict[tuple[str, int], Tensor]:
    """The log-probabilities [S] of the start's samples under the model, by kind and batch."""
    found = {}
    for kind, number, own, batch in reader.batched(what, KINDS[1:]):
        logps = models.score(reader.policy, batch).logps.cpu()
        if own:
            found[kind, number] = logps
    return found


def reweighted(
    reader: Reader,
    pooled: dict[tuple[str, int], Tensor],
    before: dict[tuple[str, int], Tensor],
    after: dict[tuple[str, int], Tensor],
) -> tuple[np.ndarray, float]:
    """Sums [G, 2, Q] of the start's samples' quantities times their weights, and of the weights; and the effective
    sample size, (sum of w)^2 / sum of w^2, as a share of the samples."""
    ratios = {key: (after[key] - logps).double() for key, logps in before.items()}
    most = parallel.max_over_ranks(max((float(own.max()) for own in ratios.values()), default=-np.inf))
    sums = torch.zeros(reader.groups[KINDS[0]], 2, reader.sae.d_sae + 1, dtype=torch.float64)
    moments = torch.zeros(3, dtype=torch.float64)  # of the weights: how many, their sum, their squares'
    for (kind, number), own in ratios.items():
        weights = (own - most).exp()  # a factor that all have goes away
        rows = weights[:, None] * pooled[kind, number].to_dense()
        groups = reader.groups_at(reader.batches[kind][number]).cpu()
        sums.index_add_(0, groups, torch.stack([rows, weights[:, None].expand_as(rows)], dim=1))
        moments += torch.stack([torch.tensor(len(own)).double(), weights.sum(), weights.square().sum()])
    sums, moments = (parallel.sum_over_ranks(x.to(parallel.device())).cpu() for x in (sums, moments))
    return sums.numpy(), float(moments[1].square() / moments[2] / moments[0])


# ------------------------------------------------------------------------------------------------------ the figures


def change_of(name: str, sums: np.ndarray) -> np.ndarray:
    """An estimate [Q] of the outcome, from sums [11, Q]: see `read_by_start`, then `reweighted`."""
    start = sums[3] / sums[4]
    if name == "reweighted":
        return sums[9] / sums[10] - (sums[3] + sums[6]) / (sums[4] + sums[7])
    return sums[0] / sums[1] - start if name == "drawn" else sums[6] / sums[7] - start


def outcome_of(
    sums: np.ndarray, figures: dict[str, np.ndarray], effective: float, left_out: str, prompts: int, count: int
) -> Outcome:
    """The outcome beside the pairs' `figures` [Q], from sums [G, 11, Q] over groups of prompts."""
    total = sums.sum(0)
    compared = total[[2, 5, 8], :-1].sum(0) >= LEAST_ACTIVE * total[[1, 4, 7], :-1].sum(0)
    names = ["drawn", *([] if left_out else ["reweighted"]), "null"]
    with np.errstate(divide="ignore", invalid="ignore"):
        fits = [fit(name, sums[:, :, :-1][:, :, compared], figures, compared) for name in names]
        columns = {"start_mean": total[3] / total[4]}
        for name in names:
            value, error = with_interval(sums, partial(change_of, name))
            columns |= {f"outcome_{name}": value, f"outcome_{name}_error": error}
    estimated = [own for own in fits if own.name != "null"]
    shown = max(estimated, key=lambda own: (np.nan_to_num(own.ceiling, nan=-1.0), own.name == "drawn")).name
    return Outcome(
        prompts=prompts,
        samples=count,
        features=int(compared.sum()),
        effective=effective,
        left_out=left_out,
        fits=fits,
        shown=shown,
        compared=compared,
        columns=columns,
    )


def fit(name: str, sums: np.ndarray, figures: dict[str, np.ndarray], compared: np.ndarray) -> Fit:
    """Of the features that are compared: sums [G, 11, K], and the pairs' figures [Q]."""
    delta, first, second = (figures[key][:-1][compared] for key in ("delta", "delta_first", "delta_second"))

    def both(s: np.ndarray) -> list[float]:
        change = change_of(name, s)
        return [r2(delta, change), correlation(ranks(delta), ranks(change))]

    found = estimates(sums, both)
    change = change_of(name, sums.sum(0))
    pairs = (delta, change), (ranks(delta), ranks(change))
    over_features = [over_resamples(measure, *pair) for measure, pair in zip((r2, correlation), pairs)]
    ceiling = reliability(halves(name, sums)) * reliability([correlation(first, second)])
    return Fit(name, found[0], over_features[0], found[1], over_features[1], ceiling)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's r; NaN where one does not vary."""
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size > 0 else float("nan")


def r2(one: np.ndarray, other: np.ndarray) -> float:
    return correlation(one, other) ** 2


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1, equal ones their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]


def over_resamples(
    measure: Callable[[np.ndarray, np.ndarray], float], one: np.ndarray, other: np.ndarray
) -> tuple[float, float]:
    """The 95 % interval of a measure of features [K], over features drawn anew with replacement (the bootstrap)."""
    generator = np.random.default_rng(0)
    drawn_anew = (generator.integers(len(one), size=len(one)) for _ in range(RESAMPLES if len(one) else 0))
    found = [measure(one[places], other[places]) for places in drawn_anew]
    low, high = np.nanpercentile(found, [2.5, 97.5]) if np.isfinite(found).any() else (np.nan, np.nan)
    return float(low), float(high)


def halves(name: str, sums: np.ndarray) -> list[float]:
    """How well the changes [K] on two halves of the prompts agree, for each of SPLITS ways to halve the groups."""
    generator, groups = np.random.default_rng(0), len(sums)
    found = []
    for _ in range(SPLITS if groups > 1 else 0):
        order = generator.permutation(groups)
        one, other = (change_of(name, sums[part].sum(0)) for part in (order[: groups // 2], order[groups // 2 :]))
        found.append(correlation(one, other))
    return found


def reliability(agreement: Sequence[float]) -> float:
    """Of the whole, from the correlation r of halves: 2 r / (1 + r) (Spearman and Brown 1910), 0 where r < 0. It is
    the squared correlation that is to be expected with the same quantity without noise."""
    r = float(np.mean(agreement)) if len(agreement) else float("nan")
    return 2 * max(r, 0.0) / (1 + max(r, 0.0)) if r == r else r
