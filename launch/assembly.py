"""From a checked configuration to a trainer that is ready to start.

`prepare` is the story of a run: the SAE, the data, the policy, the reference, the trainer. What can fail and is cheap
comes first, the weights last.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import dataloader
import models
import sae as saes
from autoencoders.formats import SAESource, load_sources
from dataloader import DataLoader, TokenisedData
from distributed import parallel
from distributed.sharding import DTYPES, shard
from launch.report import RunPage
from launch.schema import Config
from launch.settings import RunClasses, RunPaths
from modeling import adapters, head
from modeling.compiled import compiled
from modeling.settings import ModelSettings
from modeling.weights import REWARD_HEAD, check_weights, open_weights, own_weights, source_of, weights_digest
from sae import SAE, ResidualTap
from training.checkpoint import Run
from training.loop import BasicTrainer, Setup, Subject
from training.quantities import Binding
from training.reference import LiveReference, Records, Reference, load_or_build
from utils import UserError, code_file, console, file_digest, fingerprint, written

MEAN_RECORDS = 512
SHOWN_TOKENS = 60  # at each end of a text, by `show_tokens`


@dataclass(frozen=True)
class Reading:
    """SAEs, as one, and the places where they read: (layer, hook) of each, for `models.make_tap`."""

    sae: SAE
    places: list[tuple[int, str]]

    def tap(self, model: PreTrainedModel, block_name: str | None) -> ResidualTap:
        return models.make_tap(model, self.places, block_name)

    def require_fit(self, model: ModelSettings, architecture: PretrainedConfig, names: Sequence[Path | str]) -> None:
        """Raises UserError where the SAEs, called by these names, cannot read a model of this architecture."""
        width = architecture.get_text_config().hidden_size
        for name, member in zip(names, self.sae.members, strict=True):
            if member.d_in != width:
                raise UserError(f"{name}: reads vectors of {member.d_in} numbers, but {model.name} has {width}")
        self.tap(models.skeleton(architecture), model.block_name)  # raises where they cannot be read

    def new_head(self, classes: RunClasses) -> models.NewHead | None:
        """The reward head that a run starts with, if it has one of an SAE. Raises UserError where that cannot be."""
        if not classes.trainer.has_sae_head:
            return None
        (layer, hook), *others = self.places
        if others or hook != "residual":
            found = f"{len(self.places)} SAEs" if others else f"one at hook={hook}"
            raise UserError(
                f"{classes.trainer.__name__} rewards the features of one SAE that reads the residual stream, and the "
                f"configuration has {found}"
            )
        return models.NewHead(self.sae, layer, classes.binding.options["loss"].get("reconstruction", 0) > 0)


@dataclass(frozen=True)
class Data:
    """The data tokenised, and what its batches are for."""

    tokenizer: Tokenizer
    implementation: str  # of attention
    tokens: dict[str, TokenisedData]  # "train" and "eval"
    loaders: dict[str, DataLoader]


@dataclass(frozen=True)
class Input:
    """Something that a run is trained from."""

    digest: str
    source: str  # for messages


@dataclass(frozen=True)
class Inputs:
    """What a run is trained from, but for the weights."""

    data: Data
    reading: Reading | None
    binding: Binding  # with the feature weights read
    ablated: dict[int, dict[int, int]]  # see `features_by_place`


def prepare(
    config: Config, classes: RunClasses, paths: RunPaths, run: Run, cached: Sequence[str] = ("train", "eval")
) -> BasicTrainer:
    """Build everything that training or evaluating needs.

    `cached` names the splits whose records the loss will see, and so have to be in the reference cache.
    """
    return build_trainer(config, classes, paths, run, read_inputs(config, classes, paths), cached)


def read_inputs(config: Config, classes: RunClasses, paths: RunPaths) -> Inputs:
    """Read the SAEs and the data. Raises UserError where the trainer cannot work with them, or with the weights that
    the configuration names."""
    reading, binding = read_saes(config, paths) if paths.saes else None, classes.binding
    ablated: dict[int, dict[int, int]] = {}
    classes.trainer.check_weights(binding)
    new_head = None if reading is None else reading.new_head(classes)
    check_start(config, classes, paths.model, paths.tokenizer, new_head)
    if reading is not None:
        binding = binding.with_sae(reading.sae)
        ablated = features_by_place(reading, features_to_ablate(config, reading.sae), "sae.ablate")
    data = load_data(config, classes, paths)
    for loader in data.loaders.values():
        classes.trainer.check_data(binding, loader)
    return Inputs(data, reading, binding, ablated)


def check_start(
    config: Config, classes: RunClasses, folder: Path, tokenizer: Path, new_head: models.NewHead | None
) -> None:
    """Raises UserError, before a weight is read, for start weights that this loss does not train, or that do not fit
    the model in `folder`."""
    model, reward = config.model, classes.trainer.is_reward
    if reward and new_head is None and models.reads_sae(folder, model.load_from):
        raise UserError(
            f"{model.load_from or model.name_or_path}: a reward model whose head reads an SAE's features, which "
            f"loss=bradley-terry-sae trains; loss={config.loss.name} starts from a language model or from a reward "
            "model of its own kind"
        )
    if model.load_from is not None and not model.load_in_4bit:  # without it the weights lie beside their config.json
        vocabulary = len(load_tokenizer(classes, tokenizer))
        options: dict[str, Any] = {"reward": reward, "new_head": new_head, "vocabulary": vocabulary}
        check_weights(*models.outline(folder, model.load_from, **options))


def require_sae_of_head(folder: Path, load_from: str | None, new_head: models.NewHead, source: SAESource) -> None:
    """Raises UserError where the SAE of the configuration is not the one in the head of a trained reward model: its
    layer, its size and, unless the SAE is trained too, the encoder."""
    config, sae = models.load_config(folder), new_head.sae
    head = models.sae_head_of(config, folder)
    theirs = {"layer": config.get_text_config().num_hidden_layers - 1, "d_sae": head.d_sae, "k": head.k}
    ours = {"layer": new_head.layer, "d_sae": sae.d_sae, "k": sae.k}
    differ = [f"{key}={written(theirs[key])}, not {written(ours[key])}" for key in ours if ours[key] != theirs[key]]
    if not differ and not new_head.trained:
        stored = open_weights(folder, load_from)
        kept = {name: stored.read(f"{REWARD_HEAD}{name}", ()) for name in ("threshold", "b_enc", "W_enc")}
        differ = [f"another {n}" for n, tensor in kept.items() if not tensor.equal(getattr(sae, n).to(tensor.dtype))]
    if differ:
        raise UserError(
            f"{source.where}.path={source.path}: not the SAE in the reward head of {folder}, which has "
            f"{', '.join(differ)}; without {source.where}.path it is the one that the run was trained with"
        )


def load_tokenizer(classes: RunClasses, folder: Path) -> Tokenizer:
    """The tokenizer in a folder, with the control tokens of the loss."""
    tokenizer = models.load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(classes.trainer.control_tokens)})
    return tokenizer


def digests(config: Config, classes: RunClasses, paths: RunPaths, inputs: Inputs) -> dict[str, Input]:
    """The digests of all that a run is trained from, weights too, by names for messages."""
    model, binding, tokens = config.model, inputs.binding, inputs.data.tokens
    found = {
        "the training data": Input(tokens["train"].fingerprint, written(config.datasets)),
        "the evaluation data": Input(tokens["eval"].fingerprint, written(config.eval_datasets or config.datasets)),
        "the start weights": Input(weights_digest(*models.start_weights(model)), model.load_from or model.name_or_path),
    }
    if model.reference_path and binding.needs & {"reference", "live_reference"}:
        found["the reference"] = Input(weights_digest(*models.reference_weights(model)), model.reference_path)
    code = {"loss.trainer": config.loss.trainer, "loss.dataloader": config.loss.dataloader}
    code |= {f"term.{name}.function": own.function for name, own in config.term.items()}
    for key, named in code.items():
        if named and (file := code_file(named)):
            found[f"the code of {key}"] = Input(file_digest(file), named)
    for source in paths.saes:
        found[f"the SAE of {source.where}"] = Input(fingerprint(source.identity()), str(source.path))
    for given, read in zip(classes.binding.parts(), binding.parts()):
        for quantity, key in (("feature_drift", "feature_weights"), ("feature_figures", "figures")):
            values = read.options.get(quantity, {}).get(key)
            if values is not None:
                named = written(given.options[quantity][key])
                found[f"{given.where}.{key}"] = Input(fingerprint(values.tolist()), named)
    for key, named in classes.trainer.other_weights(binding).items():
        found[key] = Input(weights_digest(*own_weights(named, key)), named)
    return found


def build_trainer(
    config: Config,
    classes: RunClasses,
    paths: RunPaths,
    run: Run,
    inputs: Inputs,
    cached: Sequence[str] = ("train", "eval"),
) -> BasicTrainer:
    """Read the weights, compute the reference where it is not cached, and make the trainer."""
    data, binding = inputs.data, inputs.binding
    subject = load_subject(config, classes, data, inputs.reading)
    references = make_references(config, binding, paths, data.tokens, subject, inputs.reading, cached)
    if inputs.reading is not None and inputs.ablated:
        ablate_features(config, subject, inputs.reading, inputs.ablated)
    setup = Setup(
        **vars(subject),
        config=config,
        binding=binding,
        run=run,
        references=references,
        on_evaluation=RunPage(run.folder).update,
    )
    return classes.trainer(setup, **binding.options["init"])


def read_saes(config: Config, paths: RunPaths, folder: Path | None = None) -> Reading:
    """The SAEs of a run, for its model or the one in `folder`. Raises UserError where they do not fit the model, whose
    weights are not needed for that."""
    model, architecture = config.model, models.load_config(folder or paths.model)
    reading = Reading(load_sources(paths.saes), [(source.layer, source.hook) for source in paths.saes])
    reading.require_fit(model, architecture, [found.path for found in paths.saes])
    return reading


def load_data(config: Config, classes: RunClasses, paths: RunPaths, splits: Sequence[str] = ("train", "eval")) -> Data:
    """The tokens of some splits, and the loaders that batch them as the model here reads them best."""
    model, architecture = config.model, models.load_config(paths.model)
    tokenizer = load_tokenizer(classes, paths.tokenizer)
    pairs = None not in classes.trainer.sides
    implementation, layout = models.choose_attention(model, architecture, pairs=pairs)
    if parallel.device().type == "cpu" and layout != "padded":  # padded rows need tensors too large to use again
        parallel.keep_freed_memory()
    tokens = {split: tokenise_split(config, classes, tokenizer, split) for split in splits}
    if "train" in tokens:
        print_tokens(tokens["train"].rows, tokenizer, config.show_tokens)
    loaders = {split: make_loader(config, classes, tokenizer, layout, split, own) for split, own in tokens.items()}
    return Data(tokenizer, implementation, tokens, loaders)


def load_subject(config: Config, classes: RunClasses, data: Data, reading: Reading | None) -> Subject:
    """The policy with its tokenizer, the loaders and, where there is an SAE, a tap on it."""
    model = config.model
    inside = [layer for layer, hook in reading.places if hook == "mlp"] if reading else []
    load = functools.partial(build_model, model, data.implementation, len(data.tokenizer), uncompiled=inside)
    directory, load_from = models.start_weights(model)
    new_head = None if reading is None else reading.new_head(classes)
    policy = load(directory, load_from, reward=classes.trainer.is_reward, new_head=new_head)
    subject = Subject(policy=policy, tokenizer=data.tokenizer, loaders=data.loaders, load=load)
    if reading is not None and new_head is None:
        subject.sae, subject.tap = reading.sae.to(parallel.device()), reading.tap(policy, model.block_name)
    return subject


def features_to_ablate(config: Config, sae: SAE) -> list[int]:
    """The features that `sae.ablate` names: numbers, or those listed in a file of weights."""
    named = config.sae.ablate
    if isinstance(named, str):
        listed = list(saes.listed_features(named, sae.d_sae, "sae.ablate")[0])
        if not listed:
            raise UserError(f"sae.ablate={named}: lists no feature")
        return listed
    return named or []


def features_by_place(reading: Reading, features: Sequence[int], where: str) -> dict[int, dict[int, int]]:
    """Features of all SAEs by which SAE that is: the number of each within its own, and its number among all.

    Raises UserError for one that there is not, and one of an SAE that does not read the residual stream.
    """
    saes.require_different(features, where)
    found: dict[int, dict[int, int]] = {}
    first = 0
    for number, (member, (_, hook)) in enumerate(zip(reading.sae.members, reading.places)):
        own = {feature - first: feature for feature in features if first <= feature < first + member.d_sae}
        if own and hook != "residual":
            raise UserError(f"{where}: an SAE at hook={hook}; the residual stream is what can be changed")
        found[number], first = own, first + member.d_sae
    saes.require_features(features, first, where)
    return {number: own for number, own in found.items() if own}


def ablate_features(config: Config, subject: Subject, reading: Reading, by_place: dict[int, dict[int, int]]) -> None:
    """Take features out of the policy's forward passes in training. The model has the weights that the run starts from:
    the means are of these, also where a run goes on."""
    assert subject.sae is not None
    centres: list[Any] = [None] * len(reading.places)
    if config.sae.ablate_to == "mean":
        centres = list(subject.sae.vectors(mean_vector(subject)))
    layers = models.decoder_layers(subject.policy, config.model.block_name)
    for number, own in by_place.items():
        layer, member = reading.places[number][0], subject.sae.members[number]
        saes.ablate(layers[layer], member.W_dec[list(own)].to(parallel.device()), centres[number])
        console.print(f"sae.ablate: in training {len(own)} features of layer {layer} are set to {config.sae.ablate_to}")


def steer_features(config: Config, model: PreTrainedModel, reading: Reading) -> None:
    """Add the decoder directions of `sae.steer`, each times its weight, to the residual stream of a model."""
    weights = {own.index: own.weight for own in config.sae.steer or []}
    layers = models.decoder_layers(model, config.model.block_name)
    for number, own in features_by_place(reading, list(weights), "sae.steer").items():
        scales = torch.tensor([weights[feature] for feature in own.values()])
        directions = reading.sae.members[number].W_dec[list(own)]
        saes.steer(layers[reading.places[number][0]], (scales @ directions).to(parallel.device()))


@torch.no_grad()
def mean_vector(subject: Subject) -> Tensor:
    """The mean vector [D] that the SAE reads, of MEAN_RECORDS training records at most."""
    loader, tap = subject.loaders["train"], subject.tap
    assert tap is not None
    keys = loader.used()[:MEAN_RECORDS]
    subject.policy.eval()
    total, count = torch.zeros((), device=parallel.device()), 0
    for start in range(0, len(keys), loader.batch_size):
        batch = loader.batch(keys[start : start + loader.batch_size]).to(parallel.device())
        x = models.read_residual(subject.policy, batch, tap).float()
        kept = x[~saes.attention_sinks(x, batch.read_lengths)]
        total, count = total + kept.sum(0), count + len(kept)
    return total / count


def tokenise_split(config: Config, classes: RunClasses, tokenizer: Tokenizer, split: str) -> TokenisedData:
    """The tokenised rows of "train" or "eval". Rank 0 reads the data and tokenises it; the others open its file."""
    own: list[TokenisedData] = []

    def load() -> tuple[str, Path, dict[str, float]]:
        tokens = dataloader.load_tokens(
            config,
            {"train": "train", "eval": "test"}[split],
            tokenizer,
            classes.loader,
            max_length=config.model.max_length,
            max_prompt_length=config.model.max_prompt_length,
            options=classes.binding.options["loader"],
        )
        own.append(tokens)
        return tokens.fingerprint, tokens.path, tokens.weights

    written = parallel.from_rank_zero(load)
    return own[0] if own else TokenisedData.cached(*written)


def print_tokens(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, count: int) -> None:
    """Show the first examples as the model reads them: each token between bars."""
    for number in range(min(count, len(rows))):
        row = rows[number]
        texts = {"prompt": row["prompt_ids"]}
        texts |= {f"completion {n}": ids for n, ids in enumerate(row["completion_ids"], 1)}
        console.print(f"example {number + 1}, token by token:", markup=False)
        for name, ids in texts.items():
            pieces = [json.dumps(tokenizer.decode([token]), ensure_ascii=False)[1:-1] for token in ids]
            if len(pieces) > 2 * SHOWN_TOKENS:
                pieces[SHOWN_TOKENS:-SHOWN_TOKENS] = [f" ... {len(pieces) - 2 * SHOWN_TOKENS} more ... "]
            console.print(f"  {name}: |{'|'.join(pieces)}|", markup=False)


def make_loader(
    config: Config, classes: RunClasses, tokenizer: Tokenizer, layout: str, split: str, tokens: TokenisedData
) -> DataLoader:
    """The loader of "train" or "eval". Evaluation sees the same records whatever the run's seed."""
    model = config.model
    own: dict[str, Any] = {"batch_size": model.eval_batch_size, "n_examples": config.n_eval_examples}
    own |= {"seed": 0, "apart": True}
    if split == "train":
        own = {
            "batch_size": model.batch_size,
            "accumulation": model.gradient_accumulation_steps,
            "n_epochs": config.n_epochs,
            "n_examples": config.n_examples,
            "seed": config.seed,
        }
    return classes.loader(
        tokens,
        **own,
        max_tokens=model.max_tokens,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        layout=layout,
        read_at=config.sae.at,
        rank=parallel.rank(),
        world_size=parallel.world_size(),
    )


def make_references(
    config: Config,
    binding: Binding,
    paths: RunPaths,
    data: dict[str, TokenisedData],
    subject: Subject,
    reading: Reading | None,
    cached: Sequence[str],
) -> dict[str, Reference]:
    """The reference of each split, if the loss asks for one: a cache of its scores, or a live model. The policy itself
    computes the cache, unless the configuration names another reference."""
    needs, model = binding.needs, config.model
    if not needs & {"reference", "live_reference"}:
        return {}
    records: dict[str, Records] = {split: subject.loaders[split] for split in cached}
    if "mismatched" in needs:
        records |= {f"{split}/mismatched": dataloader.MismatchedRecords(subject.loaders[split]) for split in cached}
    live = "live_reference" in needs
    weights = models.reference_weights(model)
    teacher, tap = subject.policy, subject.tap
    if model.reference_path or (live and not model.use_peft):
        teacher = subject.load(*weights, frozen=True)
        tap = reading.tap(teacher, model.block_name) if reading else None
    if live:
        return dict.fromkeys(records, LiveReference(teacher, tap, subject.sae))
    quantised = model.load_in_4bit and teacher is subject.policy
    features: list[Any] = [source.identity() for source in paths.saes]
    if features and config.sae.at != "text":
        features.append(config.sae.at)
    numbers = (weights_digest(*weights), features, model.policy_dtype, *([quantised] if quantised else []))
    caches: dict[str, Reference] = {}
    for name, scored in records.items():
        key = fingerprint(numbers, data[name.split("/")[0]].fingerprint, scored.used())
        folder = Path(config.cache_dir) / ".cache" / "reference" / key
        caches[name] = load_or_build(folder, scored, teacher, tap, subject.sae, model.eval_batch_size)
    return caches


def build_model(
    settings: ModelSettings,
    attention: str,
    vocabulary: int,
    directory: Path,
    load_from: str | None = None,
    *,
    reward: bool = False,
    new_head: models.NewHead | None = None,
    frozen: bool = False,
    uncompiled: Sequence[int] = (),
) -> PreTrainedModel:
    """A model split over the ranks: the one to train, or a frozen one, with embeddings for `vocabulary` tokens.

    What is not trained is kept in the dtype that is computed in. `uncompiled` layers have a tap inside, which compiled
    code would not call. Raises UserError for a model in 4 bits that lacks embeddings, and for one whose scores are not
    its own (`models.require_own_scores`).
    """
    if settings.load_in_4bit and not frozen:
        if lacking := models.tokens_to_add(models.load_config(directory), vocabulary):
            raise UserError(
                f"model.load_in_4bit: the tokenizer has {lacking} tokens for which the model has no embedding"
            )
        if settings.policy_dtype == "bfloat16":  # the adapters' products are in fp32, of vectors that have 8 bits
            torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as sae.matmul_precision_for says
        source = source_of(directory, load_from)
        model = models.load_quantised(source, attention, parallel.device(), DTYPES[settings.policy_dtype])
        adapters.add(model, settings, DTYPES[settings.weights_dtype])
        layers = models.decoder_layers(model, settings.block_name)
        models.recompute_activations(layers, models.checkpointing(settings.activation_checkpointing, model))
        models.require_own_scores(model, source, reward=reward)
        return model
    compute, trained = DTYPES[settings.policy_dtype], DTYPES[settings.weights_dtype]

    def shape(model: PreTrainedModel) -> None:
        layers = models.decoder_layers(model, settings.block_name)
        if frozen:
            model.requires_grad_(False)
        elif settings.use_peft:
            adapters.add(model, settings, trained)
        if settings.compile:
            head.compile_passes(model)
            for layer in (layer for number, layer in enumerate(layers) if number not in uncompiled):
                layer.forward = compiled(layer.forward, dynamic=True)  # not the layer: its hooks stay outside
        if not frozen:
            models.recompute_activations(layers, models.checkpointing(settings.activation_checkpointing, model))
        shard(model, layers, compute, hybrid=settings.hybrid_sharding, offload=settings.cpu_offload)

    model = models.load_model(
        directory,
        attention,
        parallel.device(),
        load_from,
        reward=reward,
        new_head=new_head,
        dtype=compute if frozen or settings.use_peft else trained,
        vocabulary=vocabulary,
        shape=shape,
        offload=settings.cpu_offload,
    )
    models.require_own_scores(model, source_of(directory, load_from), reward=reward)
    return model
