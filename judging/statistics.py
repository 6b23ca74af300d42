"""Statistics of comparisons. A preference is for the candidate, from 0 (it lost) to 1 (it won); 0.5 is a tie.

Verdicts on the same prompt are not independent, so every interval treats prompts as clusters.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054  # a normal variable lies within +-Z_95 standard deviations with probability 95 %


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    estimate: float
    low: float
    high: float


def prompt_indices(prompts: Sequence[Hashable] | None, count: int) -> np.ndarray:
    """[N] The index of each verdict's prompt, from 0. Without prompts, each verdict has its own."""
    if prompts is None:
        return np.arange(count)
    indices = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([indices[prompt] for prompt in prompts])


def mean_and_error(
    values: Sequence[float], prompts: Sequence[Hashable] | None = None, weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """The weighted mean and its standard error, with prompts as clusters.

    The error is sqrt(G / (G - 1) sum_g u_g^2) / sum w, where u_g is the sum of w (value - mean) over the g-th of G
    prompts. With one value per prompt and no weights this is the usual s / sqrt(n). With a single prompt it is NaN.
    Raises ValueError if there are no values.
    """
    if not len(values):
        raise ValueError("there are no verdicts to average")
    x, w = np.asarray(values, float), np.ones(len(values)) if weights is None else np.asarray(weights, float)
    mean = float(w @ x / w.sum())
    totals = np.bincount(prompt_indices(prompts, len(x)), w * (x - mean))
    count = len(totals)
    error = math.sqrt(count / (count - 1) * float(totals @ totals)) / w.sum() if count > 1 else math.nan
    return mean, float(error)


def win_rate(
    preferences: Sequence[float], prompts: Sequence[Hashable] | None = None, weights: Sequence[float] | None = None
) -> Interval:
    """The mean preference and its 95 % interval.

    The interval is a clustered normal interval, after two won and two lost prompts are added. For plain wins and
    losses it is the interval of Agresti and Coull (The American Statistician 52, 1998), which stays accurate with few
    prompts and near 0 and 1. With many prompts the four added ones do not matter. Raises ValueError without verdicts.
    """
    rate, _ = mean_and_error(preferences, prompts, weights)
    w = np.ones(len(preferences)) if weights is None else np.asarray(weights, float)
    cluster = prompt_indices(prompts, len(preferences))
    count = int(cluster.max()) + 1
    added = np.full(4, w.sum() / count)
    centre, error = mean_and_error(
        [*preferences, 0, 0, 1, 1], [*cluster.tolist(), *range(count, count + 4)], np.concatenate([w, added]).tolist()
    )
    return Interval(rate, max(0.0, centre - Z_95 * error), min(1.0, centre + Z_95 * error))


def sign_test(preferences: Sequence[float], prompts: Sequence[Hashable] | None = None) -> float:
    """The exact two-sided p-value of the hypothesis that a prompt is equally likely to be won and lost.

    A prompt is won if the mean of its verdicts is above 0.5. Ties do not count; with ties only, the value is 1.
    """
    cluster = prompt_indices(prompts, len(preferences))
    means = np.bincount(cluster, preferences) / np.bincount(cluster)
    wins, losses = int((means > 0.5 + 1e-12).sum()), int((means < 0.5 - 1e-12).sum())
    ways = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * ways / 2 ** (wins + losses))


def length_controlled(
    preferences: Sequence[float],
    longer_by: Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
) -> Interval | None:
    """The win rate that this comparison predicts for answers of equal length.

    It is a logistic regression of the preference on tanh(d / s): d is the length of the candidate's answer minus the
    baseline's, s the standard deviation of d. This is AlpacaEval's length term (Dubois et al. 2024), fitted on this
    comparison alone and without AlpacaEval's term for the difficulty of an instruction. A standard normal prior keeps
    the slope finite. The interval uses the clustered sandwich estimator, after the four prompts of `win_rate` are added
    with equal lengths. None if all preferences are 0, or all are 1.
    """
    x, w = np.asarray(preferences, float), np.ones(len(preferences)) if weights is None else np.asarray(weights, float)
    if x.min() == x.max() and x[0] in (0.0, 1.0):
        return None
    longer, cluster = np.asarray(longer_by, float), prompt_indices(prompts, len(preferences))
    z = np.tanh(longer / (longer.std() or 1.0))
    estimate, _ = _logistic_fit(x, z, cluster, w)
    count = int(cluster.max()) + 1
    centre, error = _logistic_fit(
        np.concatenate([x, [0, 0, 1, 1]]),
        np.concatenate([z, np.zeros(4)]),
        np.concatenate([cluster, np.arange(count, count + 4)]),
        np.concatenate([w, np.full(4, w.sum() / count)]),
    )
    return Interval(*(float(_sigmoid(value)) for value in (estimate, centre - Z_95 * error, centre + Z_95 * error)))


def _logistic_fit(x: np.ndarray, z: np.ndarray, cluster: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """The intercept of a weighted logistic regression of x on z, and its standard error. All arguments are [N].

    `cluster`: the index of each value's prompt.
    """
    design, prior, parameters = np.stack([np.ones_like(z), z], axis=1), np.diag([0.0, 1.0]), np.zeros(2)
    for _ in range(100):
        p = _sigmoid(design @ parameters)
        hessian = design.T @ (design * (w * p * (1 - p))[:, None]) + prior
        step = np.linalg.solve(hessian, design.T @ (w * (x - p)) - prior @ parameters)
        parameters = parameters + step / max(1.0, float(np.abs(step).max()))  # at most 1 at a time
        if np.abs(step).max() < 1e-10:
            break
    residuals = w * (x - _sigmoid(design @ parameters))
    scores = np.stack([np.bincount(cluster, residuals * column) for column in design.T])  # [2, prompts]
    inverse = np.linalg.inv(hessian)
    return float(parameters[0]), math.sqrt((inverse @ scores @ scores.T @ inverse)[0, 0])


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


# ------------------------------------------------------------------------------------------------------- several models


class Game(NamedTuple):
    """One verdict between two models. `preference`: for the first model, 0 to 1."""

    first: str
    second: str
    preference: float
    prompt: Hashable
    weight: float = 1.0


class Standing(NamedTuple):
    """A row of the leaderboard. `rating`: on the Elo scale (400 log10 of the odds). `win_rate`: against the anchor, as
    the rating predicts it."""

    name: str
    rating: Interval
    win_rate: float


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """[P] The models' log-strengths, with mean 0, from their wins [P, P]: the weighted wins of row over column.

    A tie is half a win for each. The strengths maximise the likelihood of P(i beats j) = sigmoid(s_i - s_j) (Bradley
    and Terry 1952). Raises ValueError if some models never lost to the others, or never met them: then the maximum is
    not finite.
    """
    reaches = np.linalg.matrix_power((wins > 0) + np.eye(len(wins)), len(wins)) > 0
    if not reaches.all():
        raise ValueError("the games do not connect all models, so they cannot be ranked together")
    games = wins + wins.T
    strengths = np.zeros(len(wins))
    for _ in range(100):
        p = _sigmoid(strengths[:, None] - strengths[None, :])
        information = games * p * (1 - p)
        hessian = np.diag(information.sum(1)) - information + 1 / len(wins)  # the last term keeps the mean at 0
        step = np.linalg.solve(hessian, (wins - games * p).sum(1))
        strengths = strengths + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return strengths


def leaderboard(games: Sequence[Game], anchor: str, rounds: int = 500, seed: int = 0) -> list[Standing]:
    """Bradley-Terry ratings, best model first. The anchor has rating 0.

    The intervals are percentiles over `rounds` bootstrap samples of the prompts, each with all its games. Each pair of
    models that met gets one extra tie, so that a model that won or lost every game has a finite rating. Raises
    ValueError if the games do not connect all models.
    """
    names = list(dict.fromkeys([anchor, *(name for game in games for name in (game.first, game.second))]))
    places = {name: place for place, name in enumerate(names)}
    prompts = prompt_indices([game.prompt for game in games], len(games))
    wins = np.zeros((int(prompts.max()) + 1, len(names), len(names)))  # [prompts, P, P]
    for game, prompt in zip(games, prompts):
        first, second = places[game.first], places[game.second]
        wins[prompt, first, second] += game.weight * game.preference
        wins[prompt, second, first] += game.weight * (1 - game.preference)

    total = wins.sum(0)
    one_tie = 0.5 * ((total + total.T) > 0)

    def ratings(counts: np.ndarray) -> np.ndarray:
        strengths = bradley_terry(np.tensordot(counts, wins, 1) + one_tie)
        return (strengths - strengths[0]) * 400 / math.log(10)

    estimate = ratings(np.ones(len(wins)))
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=rounds).astype(float)
    low, high = np.percentile([ratings(counts) for counts in draws], [2.5, 97.5], axis=0)
    standings = [
        Standing(name, Interval(*map(float, bounds)), float(1 / (1 + 10 ** (-bounds[0] / 400))))
        for name, *bounds in zip(names, estimate, low, high)
    ]
    return sorted(standings, key=lambda standing: -standing.rating.estimate)


# ---------------------------------------------------------------------------------------------- published leaderboards


def alpaca_eval_row(preferences: Sequence[float], outputs: Sequence[str]) -> dict[str, float]:
    """A row of AlpacaEval's leaderboard (alpaca_eval 0.6.6, `get_winrate`).

    `preferences`: for the model, 0 to 1. `outputs`: its answers. Rates are in per cent, `standard_error` in percentage
    points, `avg_length` in whole characters.
    """
    x = np.asarray(preferences, float)
    mean, error = mean_and_error(preferences)
    wins, losses, draws = int((x > 0.5).sum()), int((x < 0.5).sum()), int((x == 0.5).sum())
    return {
        "win_rate": 100 * mean,
        "standard_error": 100 * error,
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": len(x),
        "discrete_win_rate": 100 * (wins + draws / 2) / len(x),
        "avg_length": int(np.mean([len(output) for output in outputs])),
    }
