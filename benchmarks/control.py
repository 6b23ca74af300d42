"""Can FPO hold chosen features while preferences push against them? Measured on the toy language, where truth is known.

    python benchmarks/control.py [SEED ...]     seeds 1, 2 and 3: docs/control.md, .svg and .jsonl

Preferences push two attributes at once: in every pair the chosen completion has both wanted values, the rejected one
neither. One of the two is to be held. Every loss trains the built-in model on the same pairs with the same optimiser,
and at several points of the training the rules read the attributes of samples for held-out prompts.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import track

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import models  # noqa: E402
from autoencoders.formats import load_sae, save_sae  # noqa: E402
from data import tokenise, toy  # noqa: E402
from data.batch import collate  # noqa: E402
from data.settings import ReadAt  # noqa: E402
from sae import SAE, pooled_features  # noqa: E402
from sampling.generate import Decoding, Request, sample  # noqa: E402

OUTPUT = REPO / "outputs" / "control"
PAGE = REPO / "docs" / "control.md"
START = REPO / "assets/tiny"
SAE_FILE, LAYER = OUTPUT / "sae" / "params.npz", 3  # the last layer's, as in the paper
PICTURE = REPO / "docs" / "control.svg"
FIGURES = REPO / "docs" / "control.jsonl"  # what it is drawn from
EVERY, PAIRS = 416, 832  # pairs between two measurements, and in all: whole steps of 32
PROMPTS = 400
WANTED = {"format": "list", "language": "spanish", "tone": "friendly"}
WEIGHTS = (1000, 10_000, 100_000)  # tried at one seed
EARLIER = ["++sae.path=assets/tiny-sae/params.npz", "++sae.layer=2"]  # the layer before, where features are left out
PUSHED: dict[str, list[tuple[str, str, int]]] = {  # beside tone; and the losses that hold something, what, its weight
    "format": [
        ("fpo", "probe format", 100_000),
        ("fpo", "moved format", 100_000),
        ("fpo", "moved tone", 100_000),
        ("both sides", "moved format", 10_000),
        ("zero", "left out format", 0),
        ("mean", "left out format", 0),
        ("fpo predicting", "", 0),
        ("fpo predicting", "moved there format", 100_000),
    ],
    "language": [
        ("fpo", "probe language", 100_000),
        ("zero", "left out language", 0),
        ("mean", "left out language", 0),
        ("fpo", "moved language", 100_000),
        ("fpo predicting", "", 0),
        ("fpo predicting", "moved there language", 100_000),
    ],
}
PLACES: dict[str, ReadAt] = {"moved": "text", "moved there": "predicting"}  # where features move
TOKENIZER = models.load_tokenizer(START)
WHY = [  # the head of a table
    "attribute",
    "decided after",
    "pooled",
    "the probe's features there",
    "their share of the change",
    "the moved ones'",
    "largest change",
]


@dataclass(frozen=True)
class Case:
    """One run: the attribute that is pushed beside tone, the loss, and what FPO's weights hold, by which weight.

    The losses "zero" and "mean" are DPO that leaves features out (`sae.ablate`) and sets them to that; "fpo predicting"
    is FPO with `sae.at=predicting`.
    """

    pushed: str
    loss: str
    held: str = ""  # "probe", "moved", "moved there" or "left out", and an attribute
    weight: int = 0
    seed: int = 1

    @property
    def name(self) -> str:
        held = f"-{self.held}-{self.weight}" if self.held else ""  # of what is left out the weight is 0
        return f"{self.pushed}-{self.loss}{held}-{self.seed}".replace(" ", "-")

    @property
    def label(self) -> str:
        kind, _, attribute = self.held.rpartition(" ")
        if kind == "left out":
            return f"`dpo`, {attribute}'s features of the layer before left out, set to {self.loss}"
        which = {"probe": "the probe's features", "moved": "the features that move"}.get(kind, "those that move there")
        words = {"both sides": "FPO on both sides", "fpo predicting": "`fpo` at predicting positions"}
        loss = words.get(self.loss, f"`{self.loss}`")
        return loss + (f", {attribute} held by {which}" if self.held else "")

    @property
    def options(self) -> list[str]:
        found = [f"loss={self.loss}"]
        if self.loss in ("zero", "mean"):
            file = OUTPUT / f"{self.held.replace(' ', '-')}.json"
            return ["loss=dpo", *EARLIER, f"++sae.ablate={file}", f"++sae.ablate_to={self.loss}"]
        if self.loss == "both sides":
            found = ["loss=dpo-norm", "+term=features", "++term.features.weight=0.5"]
        if self.loss == "fpo predicting":
            found = ["loss=fpo", "++sae.at=predicting"]
        if self.loss not in ("dpo", "simpo", "tdpo2"):  # beta: of a mean over about eight tokens, where dpo has the sum
            found += ["loss.beta=2", f"++sae.path={SAE_FILE}", f"++sae.layer={LAYER}"]
        if self.held:
            section = "term.features" if self.loss == "both sides" else "loss"
            found.append(f"++{section}.feature_weights={OUTPUT}/{self.held.replace(' ', '-')}-{self.weight}.json")
        return found


def methods(pushed: str) -> list[Case]:
    """What is compared on the pairs that push `pushed` and tone."""
    return [Case(pushed, loss) for loss in ("dpo", "simpo", "tdpo2", "fpo")] + [
        Case(pushed, *held) for held in PUSHED[pushed]
    ]


SWEEP = [Case("format", loss, "moved format", weight) for loss in ("fpo", "fpo-mse") for weight in WEIGHTS]


# ------------------------------------------------------------------------------------------------------------ the data


def pairs(pushed: str, split: str, count: int) -> list[dict[str, str]]:
    """Pairs whose chosen completion has both wanted values and whose rejected one has neither."""
    prefer, found, seed = (WANTED[pushed], WANTED["tone"]), list[dict[str, str]](), 0
    while len(found) < count:
        for row in toy.preferences(split, seed, 4000, prefer):
            scores = [toy.toy_score(row["prompt"], row[side], prefer) for side in ("chosen", "rejected")]
            if scores == [1.5, 0.0]:
                found.append(row)
        seed += 1
    return found[:count]


def alone(attribute: str, split: str, count: int) -> list[dict[str, str]]:
    """Pairs that differ in nothing but the attribute."""
    first = toy.ATTRIBUTES[attribute][0] == WANTED[attribute]
    chosen, rejected = ("first", "second") if first else ("second", "first")
    rows = toy.contrasts(attribute, split, 1, count)
    return [{"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]} for row in rows]


# ------------------------------------------------------------------------------------------------------------ the runs


def command(script: str, *arguments: str) -> None:
    """One of this repo's commands, on one thread."""
    line = [sys.executable, script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two runs at a time, a core each
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stdout}{done.stderr}")


def write_rows(name: str, rows: list[dict[str, str]]) -> None:
    (OUTPUT / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_sae() -> None:
    """As the built-in model's own, but of its last layer, and on half of its data."""
    options = [f"loss.layer={LAYER}", "n_examples=60000", "eval_every=null", "save_every=null", f"cache_dir={OUTPUT}"]
    command("train.py", "experiment=tiny-sae", *options)
    (trained,) = (OUTPUT / "tiny-sae" / "LATEST").glob("layer_*/*/*/params.npz")
    save_sae(load_sae(trained), SAE_FILE)


def train(name: str, data: str, count: int, *options: str) -> None:
    """One run, by the command that a user would type; an earlier one of the same configuration is kept."""
    arguments = f"""model=tiny datasets=[{OUTPUT}/{data}-train.jsonl] eval_datasets=[{OUTPUT}/{data}-test.jsonl]
        n_examples={count} optimizer=AdamW lr=3e-4 lr_schedule=linear warmup_steps=5 eval_every=null save_every={EVERY}
        intermediate_checkpoints=true n_eval_examples=256 log_every=10 cache_dir={OUTPUT} exp_name={name}"""
    command("train.py", *arguments.split(), *options)


def run(case: Case) -> list[dict[str, float]]:
    """The shares of samples after every `EVERY` pairs, trained and measured where that has not been done."""
    file = OUTPUT / case.name / "shares.json"
    if not file.is_file():
        torch.set_num_threads(1)
        train(case.name, case.pushed, PAIRS, *case.options, f"seed={case.seed}")
        steps = [OUTPUT / case.name / f"step-{count}" for count in range(EVERY, PAIRS + 1, EVERY)]
        file.write_text(json.dumps([shares(step, case.seed) for step in steps]))
    found: list[dict[str, float]] = json.loads(file.read_text())
    return found


def records(rows: list[dict[str, str]], *sides: str) -> list[dict[str, Any]]:
    """Tokenised rows with these completions, as in training."""
    found = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [row[side] for side in sides],
            "desirable": None,
            "score": None,
            "truncation_mode": "keep_start",
            "source": "toy",
        }
        for row in rows
    ]
    template = tokenise.PrefixTemplate(toy.USER, "", toy.ASSISTANT, "")
    tokens, _ = tokenise.tokenise(found, TOKENIZER, template, max_length=512, max_prompt_length=256)
    return [{**row, "index": i} for i, row in enumerate(tokens)]


def shares(weights: Path, seed: int) -> dict[str, float]:
    """What a model's samples (temperature 1) are: the share that the rules can read, and among those the share of each
    wanted value and of right answers."""
    rows = toy.demonstrations("test", 0, PROMPTS)
    requests = [Request(row["prompt_ids"], temperature=1.0) for row in records(rows, "completion")]
    model = models.load_model(weights, "eager", torch.device("cpu"))
    drawn = sample(model, TOKENIZER, requests, Decoding(32, seed), batch_size=100)
    found = [vars(toy.attributes(row["prompt"], own.text)) for row, own in zip(rows, drawn)]
    read = [own for own in found if None not in (own["language"], own["tone"], own["format"])]
    values = {attribute: mean(own[attribute] == value for own in read) for attribute, value in WANTED.items()}
    return {**values, "correct": mean(own["correct"] for own in read), "readable": len(read) / len(found)}


# ----------------------------------------------------------------------------------------------- which features to hold


def find_features() -> dict[str, list[int]]:
    """The features that the probe finds for each attribute, and those that move most where it alone is preferred; each
    set is written as weights, all others weighing 1."""
    found = {}
    for attribute in WANTED:
        options = [f"++sae.path={SAE_FILE}", f"++sae.layer={LAYER}", "++mode=features", f"++probe={attribute}"]
        command("eval.py", f"--config-path={START}", *options, f"++cache_dir={OUTPUT}")
        listed = json.loads((OUTPUT / "tiny" / "features" / f"probe-{attribute}.json").read_text())
        found[f"probe {attribute}"] = [entry["index"] for entry in listed]
        train(f"alone-{attribute}", f"alone-{attribute}", PAIRS, *Case("", "fpo").options)
        pairs = alone(attribute, "test", 256)
        for name, at in PLACES.items():
            before, after = (pooled(weights, pairs, at) for weights in (START, latest(attribute)))
            moved = (after - before).abs().mean(0).topk(len(found[f"probe {attribute}"]))
            found[f"{name} {attribute}"] = sorted(moved.indices.tolist())
    for name, features in found.items():
        for weight in WEIGHTS:
            listed = [{"index": feature, "weight": weight} for feature in features]
            (OUTPUT / f"{name.replace(' ', '-')}-{weight}.json").write_text(json.dumps(listed))
    return found


def find_features_left_out(attribute: str) -> None:
    """Write down the features that the probe finds for an attribute in the layer before."""
    options = [*EARLIER, "++mode=features", f"++probe={attribute}", f"++cache_dir={OUTPUT}", "++exp_name=earlier"]
    command("eval.py", f"--config-path={START}", *options)
    found = OUTPUT / "earlier" / "features" / f"probe-{attribute}.json"
    (OUTPUT / f"left-out-{attribute}.json").write_text(found.read_text())


def latest(attribute: str) -> Path:
    return OUTPUT / f"alone-{attribute}" / "LATEST"


@cache
def sae() -> SAE:
    return load_sae(SAE_FILE)


@torch.no_grad()
def read(weights: Path, rows: list[dict[str, str]], at: ReadAt = "text") -> tuple[Any, Tensor]:
    """The batch of both sides of some pairs, and the residual stream [R * T, D] where the SAE reads it."""
    own = {"pad_id": TOKENIZER.pad_token_id, "eos_id": TOKENIZER.eos_token_id}
    batch = collate(records(rows, "chosen", "rejected"), "padded", **own, read_at=at)
    model = models.load_model(weights, "eager", torch.device("cpu"))
    tap = models.make_tap(model, [(LAYER, "residual")])
    with tap.reading():
        models.final_hidden_states(model, batch)
    return batch, tap.take().flatten(0, 1)


def pooled(weights: Path, rows: list[dict[str, str]], at: ReadAt) -> Tensor:
    """Pooled features [S, F] of both sides of some pairs."""
    batch, residual = read(weights, rows, at)
    return pooled_features(sae(), residual[batch.read], batch.read_lengths)


def where_it_is_decided(attribute: str, found: dict[str, list[int]]) -> list[str]:
    """A line on the token after which the attribute shows: how the features there change where it alone is preferred.

    For language and tone that is the last token of the prompt, for format the opening's last.
    """
    change = []
    for weights in (START, latest(attribute)):
        batch, residual = read(weights, alone(attribute, "test", 256))
        first = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
        place = batch.predictor[first]
        if attribute == "format":  # an opening is two or three tokens, the last one its punctuation
            ends = [TOKENIZER.encode(opening, add_special_tokens=False)[-1] for opening in toy.OPENINGS]
            is_end = torch.isin(batch.target, torch.tensor(ends))
            place = torch.stack(
                [batch.position[s + is_end[s : s + n].nonzero()[0, 0]] for s, n in zip(first, batch.lengths)]
            )
        change.append(sae().encode(residual[place]).mean(0))
    before, after = change
    moved = (after - before).abs()
    largest = int(moved.argmax())
    return [
        attribute,
        "the opening's last token" if attribute == "format" else "the prompt's last token",
        "yes" if attribute == "format" else "no",
        f"{before[found[f'probe {attribute}']].sum() / before.sum():.1%}",
        f"{moved[found[f'probe {attribute}']].sum() / moved.sum():.1%}",
        f"{moved[found[f'moved {attribute}']].sum() / moved.sum():.1%}",
        f"{largest}: {before[largest]:.2f} → {after[largest]:.2f}",
    ]


# ------------------------------------------------------------------------------------------------------------ the page


def logit(share: float) -> float:
    share = min(max(share, 0.5 / PROMPTS), 1 - 0.5 / PROMPTS)
    return log(share / (1 - share))


def shifts(curves: list[list[dict[str, float]]], start: dict[str, float], pushed: str) -> list[tuple[float, float]]:
    """After every `EVERY` pairs, the log-odds that tone and the pushed attribute have gained: means over the seeds."""
    return [
        (
            mean(logit(at["tone"]) - logit(start["tone"]) for at in points),
            mean(logit(at[pushed]) - logit(start[pushed]) for at in points),
        )
        for points in zip(*curves)
    ]


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def row(label: str, curves: list[list[dict[str, float]]], start: dict[str, float], pushed: str) -> list[str]:
    """The end of the training: shares as mean (lowest to highest of the seeds), and log-odds gained."""
    ends = [curve[-1] for curve in curves]
    cells = []
    for name in (pushed, "tone", "correct"):
        values = [end[name] for end in ends]
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        cells.append(f"{mean(values):.2f}{spread}")
    tone, other = shifts(curves, start, pushed)[-1]
    return [label, *cells, f"{other:.2f}", f"{tone:.2f}", f"{other / tone:.2f}" if tone else ""]


COLOURS = (
    "#888888",
    "#b8a000",
    "#0a8a5a",
    "#1f4fd0",
    "#e07000",
    "#c0143c",
    "#8a2be2",
    "#00a0c0",
    "#804000",
    "#ff69b4",
    "#000000",
    "#7aa8ff",
)
MOST = 3.0  # log-odds: what gained more is at the edge, with its number


def lines_of(panels: dict[str, dict[str, list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    """What the picture is drawn from: a line for each method and number of pairs, means over the seeds."""
    return [
        {"pushed": pushed, "method": label, "pairs": pairs, "gained": round(gained, 2), "friendly": round(friendly, 2)}
        for pushed, methods in panels.items()
        for label, curve in methods.items()
        for pairs, (friendly, gained) in zip(range(EVERY, PAIRS + 1, EVERY), curve, strict=True)
    ]


def picture(lines: list[dict[str, Any]]) -> str:
    """An SVG: for each pushed attribute its gain against tone's along the training, a colour for each method. A method
    whose half-way point is not among the lines has its end alone."""
    size, gap = 330, 70
    scale, parts = size / MOST, []
    panels = list(dict.fromkeys(line["pushed"] for line in lines))
    methods = list(dict.fromkeys(line["method"].replace(line["pushed"], "the pushed attribute") for line in lines))
    colours = dict(zip(methods, COLOURS, strict=False))
    for number, pushed in enumerate(panels):
        left, bottom = gap + number * (size + gap), size + 40

        def at(x: float, y: float, left: float = left, bottom: float = bottom) -> str:
            return f"{left + scale * x:.1f},{bottom - scale * y:.1f}"

        parts.append(f'<text x="{left + size / 2}" y="25" class="title">{WANTED[pushed]} and friendly preferred</text>')
        parts.append(f'<path d="M{left},{bottom - size} V{bottom} H{left + size}" class="axis"/>')
        for tick in range(1, int(MOST) + 1):
            parts.append(f'<path d="M{at(tick, 0)} v5 M{at(0, tick)} h-5" class="axis"/>')
            x, y = at(tick, 0).split(",")[0], at(0, tick).split(",")[1]
            parts.append(
                f'<text x="{x}" y="{bottom + 18}">{tick}</text><text x="{left - 14}" y="{y}" dy="4">{tick}</text>'
            )
        parts.append(f'<text x="{left + size / 2}" y="{bottom + 38}">log-odds gained: friendly</text>')
        middle = f"{left - 32},{bottom - size / 2}"
        x, y = middle.split(",")
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-90 {middle})">log-odds gained: {WANTED[pushed]}</text>')
        for method, colour in colours.items():
            name = method.replace("the pushed attribute", pushed)
            own = [line for line in lines if (line["pushed"], line["method"]) == (pushed, name)]
            points = [(line["friendly"], line["gained"]) for line in own]
            places = [at(*(min(value, MOST) for value in point)) for point in points]
            if [line["pairs"] for line in own] == list(range(EVERY, PAIRS + 1, EVERY)):
                parts.append(f'<polyline points="{" ".join([at(0, 0), *places])}" stroke="{colour}"/>')
            for place, point in zip(places, points):
                x, y = place.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>')
                if max(point) > MOST:
                    parts.append(f'<text x="{x}" y="{y}" dy="-8">friendly {point[0]:.2f}</text>')
    top = size + 105
    for number, (method, colour) in enumerate(colours.items()):
        down, name = top + 20 * number, method.replace("`", "")
        parts.append(f'<circle cx="{gap}" cy="{down - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{gap + 12}" y="{down}" class="key">{name}</text>')
    width, height = 2 * gap + len(panels) * (size + gap), top + 20 * len(colours)
    style = (
        "text{font:13px sans-serif;text-anchor:middle;fill:#222}.title{font-size:15px}.key{text-anchor:start}"
        ".axis{stroke:#222;fill:none}polyline{fill:none;stroke-width:1.8}"
    )
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="white"/>\n{inside}\n</svg>\n'
    )


def main() -> None:
    seeds = [int(argument) for argument in sys.argv[1:]] or [1, 2, 3]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for pushed in PUSHED:
        for split, count in (("train", PAIRS), ("test", 256)):
            write_rows(f"{pushed}-{split}", pairs(pushed, split, count))
    for attribute in WANTED:
        for split, count in (("train", PAIRS), ("test", 256)):
            write_rows(f"alone-{attribute}-{split}", alone(attribute, split, count))
    if not SAE_FILE.is_file():
        train_sae()
    found = find_features()
    for pushed in PUSHED:
        find_features_left_out(pushed)
    compared = [method for pushed in PUSHED for method in methods(pushed)]
    cases = [replace(case, seed=seed) for case in compared for seed in seeds]
    cases = list(dict.fromkeys(cases + SWEEP))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = dict(zip(cases, track(pool.map(run, cases), "training", total=len(cases), transient=True)))
    start = shares(START, 0)

    sections = {"why": table([WHY, *(where_it_is_decided(attribute, found) for attribute in WANTED)])}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for pushed in PUSHED:
        own = {case.label: [results[replace(case, seed=seed)] for seed in seeds] for case in methods(pushed)}
        panels[pushed] = {label: shifts(curves, start, pushed) for label, curves in own.items()}
        head = ["", WANTED[pushed], "friendly", "correct", f"{WANTED[pushed]}, log-odds", "friendly, log-odds", "ratio"]
        before = ["before training", *(f"{start[name]:.2f}" for name in (pushed, "tone", "correct")), "", "", ""]
        sections[pushed] = table([head, before, *(row(label, own[label], start, pushed) for label in own)])
    rows = [row(f"`{case.loss}`, weight {case.weight:,}", [results[case]], start, case.pushed) for case in SWEEP]
    head = ["", "list", "friendly", "correct", "list, log-odds", "friendly, log-odds", "ratio"]
    sections["sweep"] = table([head, *rows])
    page = PAGE.read_text()
    for name, text in sections.items():
        print(f"\n{name}\n{text}")
        page = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, text=text: m[1] + text + m[2], page, flags=re.S
        )
    PAGE.write_text(page)
    lines = lines_of(panels)
    FIGURES.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    PICTURE.write_text(picture(lines))


if __name__ == "__main__":
    main()
