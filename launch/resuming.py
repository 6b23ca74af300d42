"""A run that goes on: whether it is the same run, and whether it is finished.

It has to have the configuration, the data, the weights and the SAEs that its state was trained with; but it may be
measured otherwise, computed otherwise, and made longer.
"""

from typing import Any

from omegaconf import OmegaConf

from dataloader import DataLoader
from distributed import parallel
from launch import settings
from launch.assembly import Input
from launch.report import SUMMARY, read_summary
from launch.schema import Config
from launch.settings import RunPaths
from training.checkpoint import Run
from training.loop import BasicTrainer
from training.settings import TrainingSettings
from utils import UserError, console, flat, known_keys

# Keys that may differ between a run and its resumption. None of them changes a step that is still to come, but for
# rounding where they say how it is computed. `sae` apart, what only eval.py reads is among them.
MAY_CHANGE = frozenset(
    {
        *(key for key in {*known_keys(Config)} - {*known_keys(TrainingSettings)} if not f"{key}.".startswith("sae.")),
        *("exp_name", "cache_dir", "resume", "max_bad_rows", "log_to", "wandb"),
        *("do_first_eval", "eval_every", "n_eval_examples", "log_every", "save_every", "keep_checkpoints"),
        *("export", "export_dtype", "eval_best", "intermediate_checkpoints", "toy_comparison"),
        *("model.eval_batch_size", "model.max_tokens"),
        *("model.gradient_accumulation_steps", "model.layout", "model.attn_implementation", "model.compile"),
        *("model.activation_checkpointing", "model.hybrid_sharding", "model.cpu_offload"),
    }
)
LENGTH = frozenset({"n_epochs", "n_examples"})
# What a finished run does again.
AT_THE_END = frozenset({*LENGTH, "n_eval_examples", "toy_comparison", "export", "export_dtype"})


def begin(run: Run, config: Config, trainer: type[BasicTrainer], paths: RunPaths) -> tuple[Config, bool]:
    """Find what there is to go on from. Gives the configuration with its defaults, and whether the run is finished. For
    all ranks to call.

    Raises UserError where what is there is no run, or a run with a configuration that gives other steps.
    """
    parallel.from_rank_zero(run.require_own)
    if config.resume == "never":
        return settings.with_defaults(config, paths, None), False
    run.find_state()
    saved = None
    if run.place:
        saved = settings.typed(settings.completed(OmegaConf.create(settings.as_text(run.place["config"]))))
    config = settings.with_defaults(config, paths, saved)
    if saved is not None:
        changed = {key: values for key, values in differences(saved, config).items() if not may_change(key, trainer)}
        if changed:
            raise UserError(
                f"{run.folder} holds a run with another configuration:\n"
                + "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items())
                + "\nUse another exp_name, or resume=never to start over and replace it."
            )
    if parallel.from_rank_zero(lambda: is_finished(run, config)):
        return config, True
    if not run.place and parallel.from_rank_zero(run.saved):
        raise UserError(f"{run.states}: every state there is damaged; resume=never starts over")
    if not run.place and ((run.folder / "LATEST").is_symlink() or (run.folder / SUMMARY).is_file()):
        raise UserError(
            f"{run.folder} holds what a run has trained, and no state that it could go on from (keep_checkpoints=0 "
            "leaves none). Use another exp_name, or resume=never to start over and replace it"
        )
    return config, False


def may_change(key: str, trainer: type[BasicTrainer]) -> bool:
    """Whether a key, such as `model.layout`, may differ from that of the state."""
    return key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE or (key in LENGTH and trainer.can_grow)


def is_finished(run: Run, config: Config) -> bool:
    """Whether a run with this configuration has written its last file here, and neither that nor its log has been
    changed since."""
    try:
        saved = settings.saved_config(run.folder)
    except UserError:
        return False
    is_there = read_summary(run.folder) is not None and (run.folder / "LATEST").exists()
    if not is_there and (run.folder / SUMMARY).is_file():
        console.print(f"{run.folder / SUMMARY} is not what the run wrote, or LATEST is gone: the end is done again")
    if saved is None or not is_there or not run.log_is_sound():
        return False
    differ = {
        key for key, (old, _) in differences(saved, config).items() if key not in settings.LEFT_OPEN or old is not None
    }
    return not any(key in AT_THE_END or not may_change(key, BasicTrainer) for key in differ)


def require_same_inputs(run: Run, inputs: dict[str, Input], loader: DataLoader, *, can_grow: bool) -> None:
    """Note what the run is trained from. Raises UserError where a run that goes on was trained from something else, or
    is longer already than it is to be. For all ranks to call.

    A state whose last step a longer run would not have taken so is passed over.
    """
    run.inputs = {name: own.digest for name, own in inputs.items()}
    if not run.place:
        return
    known = run.place["inputs"]
    changed = [f"  {name} ({own.source})" for name, own in inputs.items() if known.get(name) != own.digest]
    if changed:
        raise UserError(
            f"{run.folder} holds a run that was trained from other inputs than are there now:\n"
            + "\n".join(changed)
            + "\nPut back what was there; or use another exp_name, or resume=never to start over and replace it."
        )
    if run.place["step"] > len(loader) and can_grow:
        raise UserError(f"{run.folder}: that run has trained on {run.place['examples']:,} examples already")
    if can_grow and not is_on_the_way(run.place, loader):
        newest = run.place
        run.find_state(lambda place: is_on_the_way(place, loader))
        if not run.place:
            raise UserError(
                f"{run.folder}: the last step there, {newest['step']:,}, had fewer examples than it would have in a "
                "longer run, and no state before it is kept. Use another exp_name, or resume=never to start over"
            )


def is_on_the_way(place: dict[str, Any], loader: DataLoader) -> bool:
    """Whether a run comes through this place: through this step with so many examples."""
    return place["step"] <= len(loader) and loader.examples_before(place["step"]) == place["examples"]


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ."""
    a, b = flat(old.model_dump()), flat(new.model_dump())
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
