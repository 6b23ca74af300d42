"""Sample from a policy, or measure it: python eval.py --config-path=RUN [++mode=MODE] [++key=value ...]

    python eval.py --config-path=outputs/my_run                     writes samples/my_run.json
    python eval.py --config-path=outputs/my_run ++mode=alpacaeval   a benchmark's questions; also arenahard, mtbench
    python eval.py --config-path=outputs/my_run ++mode=eval         the metrics of the evaluation set, diversity, KL
    python eval.py --config-path=outputs/my_run ++mode=features     what training did to the features, as a page
    python eval.py --config-path=MODEL ++mode=features ++data=[hh]  what preference pairs would teach the model;
                                                                    with a finished run: and what it learnt
    python eval.py --config-path=outputs/my_run ++mode=features ++probe=[a,b]   the SAE's features that tell two data
                                                                    sets apart, and weights for loss.feature_weights
    python eval.py --config-path=outputs/rm ++mode=label ++files=[samples/a.json] ++labels=pairs.jsonl
                                                                    training data, by a reward model's scores
    python eval.py --config-path=outputs/rm ++mode=rewards          a reward model's accuracy, and best-of-n curves

--config-path is a run directory, a config.yaml that a run wrote, or a model in the Hub's format; any key of the
configuration can be changed. If it is killed, the same command goes on where it was.
"""

from launch import startup

if __name__ == "__main__":
    startup.begin(__doc__, ["sampling", "labels", "features", "the sparse autoencoder", "data"])

import argparse
import sys
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

import dataloader
import models
from data import tokenise
from data.rows import is_samples_file
from distributed import parallel
from features import measure, outcome, paid, pairs, probe, report
from judging import answers, labels, reward_figures, rewards
from launch import assembly, settings
from launch.policies import (
    Policy,
    find_policy,
    read_config,
    require_language_model,
    require_room,
    trainer_class,
)
from launch.report import write_run_page
from launch.schema import Config
from sampling import backends, benchmark_files, diversity, samples
from training.checkpoint import Run
from utils import (
    UserError,
    console,
    file_digest,
    require_different_files,
    require_writable,
    sealed,
    user_path,
    write_json,
)


def write_samples(raw: DictConfig, path: Path, overrides: list[str]) -> None:
    """`<samples_dir>/<exp_name>.json`, or of a benchmark `<exp_name>-<mode>.json` and the file for its own tools."""
    config = settings.typed(raw)
    if config.sae.steer and config.backend != "transformers":
        raise UserError("sae.steer changes the model in this process: backend=transformers")
    decoding = samples.decoding_of(config)
    control = trainer_class(config).control_tokens
    writes = parallel.rank() == 0
    if config.backend == "openai" and control:
        raise UserError(f"backend=openai: loss={config.loss.name} needs its control tokens; use another back-end")
    records = samples.records_to_sample(config, every=config.mode != "sample")
    server = backends.ServerBackend(config, len(records)) if config.backend == "openai" else None
    if server:
        weights, template = f"{server.model} at {config.base_url}", str(config.template or "chat")
        source = weights
    else:
        policy = find_policy(path, config, overrides)
        require_language_model(config, policy)
        require_room(config, policy, records)
        tokenizer = models.load_tokenizer(policy.tokenizer)
        weights, template = policy.digest(), tokenise.template_name(config, tokenizer)
        source = policy.source()
    name = config.exp_name if config.mode == "sample" else f"{config.exp_name}-{config.mode}"
    target = Path(config.samples_dir) / f"{name}.json"
    handed = benchmark_files.path_of(config.mode, config.exp_name, target.parent)
    if writes:
        require_writable(*filter(None, (target, handed)))
    identity = samples.identity_of(config, decoding, records, weights, template)
    if config.sae.steer:
        identity["steer"] = [own.model_dump() for own in config.sae.steer]
    samples.require_own_file(target, identity, source)
    with samples.sample_log(target, identity, writes) as log:
        if log.finished:
            console.print(f"{target}: these samples are there already; delete the file to draw them again")
            return
        backend = server or local_backend(config, policy, tokenizer, control)
        conversations = samples.converse(config, decoding, records, backend, log)
        if writes and handed:
            benchmark_files.write_benchmark_file(config.mode, handed, config.exp_name, conversations, log.sampled_at)
        refused = {"refused_parameters": server.refused_parameters} if server and server.refused_parameters else {}
        log.publish(
            sealed(
                {
                    "sampled_at": log.sampled_at,
                    "sampled_from": source,
                    "config": config.model_dump(),
                    "sampling": identity,
                    **refused,
                    "samples": [talk.entry() for talk in conversations],
                }
            )
        )
    judged = f"-f {target}"
    if handed:
        console.print(f"for the benchmark's own tools: {handed}")
        judged = f"-f {handed} {benchmark_files.JUDGED[config.mode]}"
    answered = benchmark_files.answered(conversations)
    cut = sum(talk.answers[-1].finish_reason == "length" for talk in answered)
    console.print(f"{len(answered)} samples in {target}, {cut} of them cut at max_new_tokens")
    if failed := len(conversations) - len(answered):
        console.print(
            f"{failed} more have no answer, and say why; the same command asks for them again", style="yellow"
        )
    judge = " -j toy" if {source.entry for source in dataloader.sources(config, "test")} <= TOY else ""
    console.print(f"judge them: python compare.py {judged}{judge}")


def local_backend(config: Config, policy: Policy, tokenizer: Tokenizer, control: tuple[str, ...]) -> backends.Backend:
    """The back-end that has the policy's weights in this process. Raises UserError where it cannot have them."""
    if config.backend == "vllm":
        if policy.load_from and not policy.adapter:
            raise UserError(
                f"backend=vllm reads a directory in the Hub's format, or an adapter, not {policy.load_from}: "
                "++export=[hub] lets a run write one, and --config-path= names it"
            )
        return backends.VLLMBackend(config, policy.folder, tokenizer, control, policy.adapter)
    if policy.adapter:
        raise UserError(
            f"model.load_from={policy.load_from}: an adapter, which backend=vllm reads; LATEST is the merged model"
        )
    reading = None
    if config.sae.steer:
        reading = assembly.read_saes(config, settings.find_required_paths(config), policy.folder)
        assembly.features_by_place(reading, [own.index for own in config.sae.steer], "sae.steer")
    model = backends.load_policy(config, policy.folder, policy.load_from, len(tokenizer))
    if reading is not None:
        assembly.steer_features(config, model, reading)
    return backends.TransformersBackend(config, model, tokenizer, control)


def write_metrics(raw: DictConfig, path: Path, overrides: list[str]) -> None:
    """The metrics of the whole evaluation set, and the figures of a policy's own samples, in `<run>/eval.json`."""
    config, classes = settings.check_config(raw, modes=["eval"])
    decoding = samples.decoding_of(config)
    policy = find_policy(path, config, overrides)
    if policy.run is None or config.backend != "transformers":
        raise UserError("mode=eval measures the policy of a run, with backend=transformers")
    records = samples.records_to_sample(config) if policy.writes_text() else []
    if records:
        require_room(config, policy, records)
    paths = settings.find_paths(config, classes.binding.needs)
    inputs = assembly.read_inputs(config, classes, paths)
    if inputs.reading is not None and (new_head := inputs.reading.new_head(classes)):
        assembly.require_sae_of_head(policy.folder, policy.load_from, new_head, paths.saes[0])
    trainer = assembly.build_trainer(config, classes, paths, Run(policy.run), inputs, cached=["eval"])
    trainer.read_export(policy.folder)
    values = trainer.evaluate()
    if records:
        template = tokenise.template_name(config, trainer.tokenizer)
        identity = samples.identity_of(config, decoding, records, policy.digest(), template)
        with samples.sample_log(policy.run / "eval.json", identity, parallel.rank() == 0) as log:
            backend = backends.TransformersBackend(config, trainer.policy, trainer.tokenizer, trainer.control_tokens)
            talks = samples.converse(config, decoding, records, backend, log)
            values |= diversity.sample_figures(config, trainer, talks)
            log.publish(values)
    elif parallel.rank() == 0:
        write_json(policy.run / "eval.json", values)
    if parallel.rank() == 0:
        update_run_page(policy.run)
    for name, value in values.items():
        console.print(f"{name:32} {value:.6g}")
    console.print(f"written to {policy.run / 'eval.json'}")


def write_features(raw: DictConfig, path: Path, overrides: list[str]) -> None:
    """What training did to the features, in `<run>/features/`: a page and a table. With data: what its pairs would
    teach, and what a finished run learnt. With a probe: which features tell two kinds of text apart. Of a reward model
    on an SAE: which features it pays for."""
    if raw.score_by is not None and (raw.data is None or raw.probe is not None):
        raise UserError("score_by goes with data, and without a probe, which scores the pairs itself")
    if raw.compare_to is not None and (raw.data is not None or raw.probe is not None):
        raise UserError("compare_to goes without data and without a probe: it is for what training did to the features")
    if raw.data is not None:
        config, _ = settings.check_config(raw, modes=["features"])
        pairs.write_data_features(config, outcome.finished(config, path, overrides))
        return
    if raw.probe is not None:
        probe.write_probe(settings.typed(raw), path, overrides)
        return
    config, classes = settings.check_config(raw, modes=["features"])
    if classes.trainer.has_sae_head:
        paid.write_paid_features(config, classes, path, overrides)
        return
    measured, run = measure.measure(config, classes, path, overrides)
    if parallel.rank() == 0:
        report.write_feature_report(measured, run / "features")
        update_run_page(run)
    console.print(report.finding(measured))
    console.print(f"written to {run / 'features'}: report.html, drift.parquet")


def write_labels(raw: DictConfig, path: Path, overrides: list[str]) -> None:
    """Training data in the file `labels`, from samples that the reward model scores; beside it how it was made, and the
    rewards, which another command on the same samples finds there."""
    config = settings.typed(raw)
    if config.files is None or config.labels is None:
        raise UserError("mode=label: ++files=[samples/x.json] names samples, ++labels=pairs.jsonl the file to write")
    target, sources = Path(config.labels), files_of(config)
    parallel.from_rank_zero(lambda: labels.require_place(target, "labels=", sources))
    recipe = labels.Recipe(config.label_as, config.rejected, config.min_margin, config.threshold, config.seed)
    labels.require_used(recipe)
    texts = labels.texts_of([answers.read_answers(source) for source in sources])
    labels.require_enough(texts, recipe, ", ".join(map(str, sources)))
    model = reward_model(config, path, overrides)
    found, bad = model.score(texts, labels.beside(target, "rewards.jsonl"))
    made = labels.label(labels.by_prompt(texts, found), recipe)
    made.left_out.update(bad.counts)
    if missing := sum(text.answer is None for text in texts):
        made.left_out[labels.NO_ANSWER] += missing
    how = {**model.identity, **recipe._asdict(), "files": {str(file): file_digest(file) for file in sources}}
    parallel.from_rank_zero(lambda: labels.publish(target, made, how))


def write_reward_figures(raw: DictConfig, path: Path, overrides: list[str]) -> None:
    """How good a reward model is, in `<samples_dir>/<exp_name>-rewards.json`: accuracies on the held-out pairs, or on
    the pairs of `files`, and best-of-n curves of the samples in `files`."""
    config = settings.typed(raw)
    model = reward_model(config, path, overrides)
    target = Path(config.samples_dir) / f"{config.exp_name}-rewards.json"
    parallel.from_rank_zero(lambda: labels.require_no_link(target, target.with_suffix(".jsonl")))
    parallel.from_rank_zero(lambda: labels.require_made_here(target, "accuracy", model.identity))
    parallel.from_rank_zero(lambda: require_writable(target, target.with_suffix(".jsonl")))
    pairs, talks = reward_figures.held_out_pairs(config) if config.files is None else [], {}
    for file in files_of(config):
        if is_samples_file(file):
            talks[str(file)] = labels.texts_of([answers.read_answers(file)])
        else:
            pairs += reward_figures.read_pairs(file, config.max_bad_rows)
    groups = {"": [text for pair in pairs for text in pair.texts()], **talks}
    found, bad = model.score([text for own in groups.values() for text in own], target.with_suffix(".jsonl"))
    rest = iter(found)
    scored = {name: [next(rest) for _ in own] for name, own in groups.items()}
    figures = {
        "accuracy": reward_figures.accuracies(pairs, scored[""]),
        "best_of_n": {
            name: reward_figures.best_of_n_curve(name, labels.by_prompt(own, scored[name]))
            for name, own in talks.items()
        },
    }
    if bad.counts:
        console.print(bad.summary(), style="yellow")
    if parallel.rank() == 0:
        write_json(target, {**model.identity, "left_out": bad.report(), **figures})
    if pairs:
        reward_figures.print_accuracies(figures["accuracy"])
    for name, curve in figures["best_of_n"].items():
        reward_figures.print_curve(name, curve)
    console.print(f"written to {target}")


def files_of(config: Config) -> list[Path]:
    """The files that the configuration names. Raises UserError for one that is not there, or named twice."""
    found = [Path(name) for name in ([config.files] if isinstance(config.files, str) else config.files or [])]
    if missing := [str(file) for file in found if not file.is_file()]:
        raise UserError(f"files: {', '.join(missing)}: no file here (looked for from {Path.cwd()})")
    require_different_files(found, "files")
    return found


def reward_model(config: Config, path: Path, overrides: list[str]) -> rewards.RewardModel:
    """The reward model that the command line names."""
    policy, as_trained = find_policy(path, config, overrides), trainer_class(config).is_reward
    places = (policy.folder, policy.tokenizer, policy.load_from)
    return rewards.RewardModel(config, *places, digest=policy.digest(), as_trained=as_trained)


def update_run_page(run: Path) -> None:
    """Let the run page link to what was written now."""
    if (run / "metrics.jsonl").is_file():
        write_run_page(run)


TOY = {"toy", "toy_sft"}  # data sets whose answers the toy language's rules can judge
WORK = {  # by mode, where it is not sampling
    "eval": write_metrics,
    "features": write_features,
    "label": write_labels,
    "rewards": write_reward_figures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-path", required=True, type=user_path, help="a run directory, a YAML file, or a model")
    parser.add_argument("overrides", nargs="*", help="++key=value, of the run's config.yaml (mode, n_samples, ...)")
    arguments = parser.parse_args()
    try:
        overrides = settings.translate_arguments(arguments.overrides)
        raw = read_config(arguments.config_path, overrides)
    except (UserError, HydraException) as error:
        console.print(str(error), style="red")
        sys.exit(2)
    work = WORK.get(raw.mode, write_samples)
    split = raw.mode in WORK and raw.probe is None
    ranks = settings.ranks_of(raw) if split else parallel.launched_ranks() or 1  # a sampler splits only if told to
    parallel.run(lambda: work(raw, arguments.config_path, overrides), ranks)


if __name__ == "__main__":
    main()
