"""This repo's autoencoders beside those of SAELens's own BatchTopK trainer: error and cross-entropy at the same L0.

    python benchmarks/sae.py         3 seeds, 12 minutes on 2 cores; writes docs/sae-training.md's tables

Both see the same activations of the built-in model (layer 2) in the same order and steps, 403 of about 1,024 tokens,
and have 1,024 latents, k = 16; a latent is dead after 100,000 silent tokens. Ours is `loss=sae` as it comes, but for
sizes and a warm-up that fits so short a run. SAELens's is its `BatchTopKTrainingSAE` under its `SAETrainer`, with the
defaults of both (learning rate 3e-4, auxiliary coefficient 1, decoder rows of norm 0.1 at the start, no warm-up) and
what its tutorial adds: inputs scaled by their average norm, learning rate down to 0 over the last fifth. A second row
gives it our learning rate.

Two more tables, of a fifth of the steps and one seed: Matryoshka, with groups of 64 and 256 latents, against its
`MatryoshkaBatchTopKTrainingSAE`; and the built-in SAE of that layer trained further, by `loss=sae-finetune` and by its
`BatchTopKTrainingSAE` that begins with that SAE's weights. In these both have our learning rate.

The two set their thresholds differently, so all are measured twice: as they are saved, and at the same L0, with the
threshold set for every one of them as this repo does it, to 16 active latents a token on 16 steps of training data.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

OUTPUT = REPO / "outputs" / "sae-benchmark"
PAGE = REPO / "docs" / "sae-training.md"
SEEDS, K, STEP, LATENTS, DEAD_AFTER = (1, 2, 3), 16, 1024, 1024, 100_000
OUR_LR = 8e-4  # 2e-4 / sqrt(1024 / 2^14)
GROUPS = [64, 256]
BUILT_IN = "assets/tiny-sae/params.npz"
STUDIES: dict[
    str, tuple[tuple[int, ...], int, dict[str, float]]
] = {  # seeds, texts, trainers with their learning rates
    "BatchTopK": (SEEDS, 30_000, {"this repo": OUR_LR, "SAELens": 3e-4, "SAELens at our rate": OUR_LR}),
    "Matryoshka": (SEEDS[:1], 6_000, {"this repo": OUR_LR, "SAELens": OUR_LR}),
    "the built-in SAE, trained further": (SEEDS[:1], 6_000, {"this repo": OUR_LR, "SAELens": OUR_LR}),
}
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
AS_THEY_ARE = {"normalize_activations": "none", "apply_b_dec_to_input": False}  # the vectors that the weights are of
MEASURES = {"l0": "L0", "fvu": "FVU", "ce_recovered": "CE recovered", "dead": "dead"}


def overrides(study: str, seed: int, lr: float) -> list[str]:
    texts = STUDIES[study][1]
    sizes = f"loss.k={K} loss.batch_tokens={STEP} loss.dead_after={DEAD_AFTER}"
    own = f"loss=sae loss.layer=2 loss.d_sae={LATENTS}"
    if study == "Matryoshka":
        own += f" loss.groups={str(GROUPS).replace(' ', '')}"
    elif study != "BatchTopK":
        own = f"loss=sae-finetune ++sae.path={BUILT_IN} ++sae.layer=2"
    run = f"n_examples={texts} lr={lr} warmup_steps={texts // 600} seed={seed} cache_dir={OUTPUT} log_every=50"
    rest = "n_eval_examples=512 do_first_eval=false save_every=null"
    return f"{own} model=tiny datasets=[toy_sft] {sizes} {run} {rest}".split()


def measure(study: str, trainer: str, seed: int) -> dict[str, dict[str, float]]:
    """Train one autoencoder, and measure it as it is saved and at the same L0."""
    from hydra import compose, initialize_config_dir

    from launch import assembly, settings
    from training.checkpoint import Run

    lr = STUDIES[study][2][trainer]
    name = re.sub(r"\W+", "-", f"{study}-{trainer}-{seed}")
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        raw = compose("config", overrides=[*overrides(study, seed, lr), f"exp_name={name}", "resume=never"])
        config, classes = settings.check_config(raw)
        paths = settings.find_paths(config, classes.binding.needs)
    run = Run(OUTPUT / name)
    with run.writing():
        run.start(config)
        own: Any = assembly.prepare(config, classes, paths, run)
        if trainer == "this repo":
            own.train()
            return dict.fromkeys(("as saved", "same L0"), figures(own, own.last_evaluation))
        own.exported = [train_saelens(study, own, lr, run.folder, seed)]
        as_saved = figures(own, own.evaluate())
        set_threshold(own)
        return {"as saved": as_saved, "same L0": figures(own, own.evaluate())}


def figures(own, evaluation: dict[str, float]) -> dict[str, float]:
    (ours,) = own.autoencoders
    dead = float((ours.silent > DEAD_AFTER).float().mean())
    return {name: evaluation.get(f"sae_eval/{name}", dead) for name in MEASURES}


def train_saelens(study: str, own, lr: float, folder: Path, seed: int):
    """SAELens's trainer on the steps of ours; gives what it saved, and tells ours which latents are dead."""
    import torch
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from autoencoders.formats import load_sae

    torch.manual_seed(seed)
    stream, for_scale = own.stream, 20
    sizes: dict[str, Any] = {"d_in": 128, "d_sae": LATENTS, "k": K, "normalize_activations": "expected_average_only_in"}
    if study == "Matryoshka":
        widths = [*GROUPS, LATENTS]
        begun = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=widths, **sizes))
    else:
        further = study != "BatchTopK"
        begun = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes | (AS_THEY_ARE if further else {})))
        if further:
            start = load_sae(REPO / BUILT_IN)
            begun.load_state_dict({**begun.state_dict(), **{n: getattr(start, n) for n in WEIGHTS}})
    training = SAETrainerConfig(
        total_training_samples=stream.tokens,
        train_batch_size_samples=STEP,
        lr=lr,
        lr_end=lr / 10,  # as its runner has it; read by other schedules only
        lr_decay_steps=len(stream) // 5,
        dead_feature_window=DEAD_AFTER // STEP,
        n_batches_for_norm_estimate=for_scale,
    )
    every = chain(zip(range(for_scale), stream.steps()), enumerate(stream.steps()))
    trainer = SAETrainer(training, begun, (step[0].x.float() for _, step in every))
    autoencoder = trainer.fit()
    autoencoder.save_inference_model(folder / "saelens")
    (ours,) = own.autoencoders
    ours.silent.copy_(trainer.n_forward_passes_since_fired * STEP)
    return load_sae(folder / "saelens")


def set_threshold(own) -> None:
    """As `SAETrainer.set_thresholds` does it, for the autoencoder that is measured."""
    import torch

    from autoencoders import training

    (sae,), (ours,) = own.exported, own.autoencoders
    limits = []
    for step in own.stream.in_buffer(training.SAMPLE_STEPS):
        pre = (step.x.float() @ sae.W_enc + sae.b_enc).relu()
        limits.append(ours.smallest_kept(pre, step.tokens))
    sae.threshold.fill_(torch.stack(limits).mean())


def in_a_process(case: tuple[str, int]) -> dict[str, dict[str, dict[str, float]]]:
    """What `measure` gives for each trainer of a study, in a process with one thread; kept, so that a killed benchmark
    goes on."""
    study, seed = case
    kept = OUTPUT / f"{study.partition(',')[0].replace(' ', '-')}-{seed}.json"
    if not kept.exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", study, str(seed)]
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{command}\n{done.stdout}{done.stderr}")
        kept.write_text(done.stdout.splitlines()[-1])
    return json.loads(kept.read_text())


def table(study: str, found: dict[int, dict[str, dict[str, dict[str, float]]]], which: str) -> list[str]:
    """Mean over the seeds, and the standard deviation where there are several."""
    lines = [f"| trainer | {' | '.join(MEASURES.values())} |", "|---" * (len(MEASURES) + 1) + "|"]
    seeds, _, trainers = STUDIES[study]
    for trainer in trainers:
        cells = []
        for name in MEASURES:
            values = [found[seed][trainer][which][name] for seed in seeds]
            cells.append(f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else ""))
        lines.append(f"| {trainer} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("STUDY", "SEED"), help="one autoencoder of each trainer, as JSON")
    one = parser.parse_args().one
    if one:
        import torch.distributed as dist

        from distributed import parallel

        parallel.init_process_group(0, 1, dist.HashStore())
        study, seed = one[0], int(one[1])
        print(json.dumps({trainer: measure(study, trainer, seed) for trainer in STUDIES[study][2]}))
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    cases = [(study, seed) for study, (seeds, _, _) in STUDIES.items() for seed in seeds]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(in_a_process, cases)))
    lines: list[str] = []
    for study, (seeds, texts, _) in STUDIES.items():
        own = {seed: found[study, seed] for seed in seeds}
        for which in ("same L0", "as saved"):
            place = "at the same L0" if which == "same L0" else which
            how = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {texts:,} texts"
            lines += [f"{study[0].upper()}{study[1:]}, {place} ({how}):", "", *table(study, own, which), ""]
    text = "\n".join(lines).rstrip()
    print(text)
    head, mark, _ = PAGE.read_text().partition("<!-- benchmarks/sae.py -->\n")
    PAGE.write_text(f"{head}{mark}\n{text}\n")


if __name__ == "__main__":
    main()
