"""What a reward model says of answers: a run of `loss=bradley-terry`, or a sequence classifier with one output.

A run reads a text as it did in training, and its reward at the last token. A classifier in the Hub's format by itself
reads the conversation as its tokenizer's chat template writes it, and is asked as `AutoModelForSequenceClassification`
is. Each reward is on disk before the next batch is scored, under a key of the weights and the tokens.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import models
from data import tokenise
from data.batch import batches_by_length, collate
from data.rows import BadRow, BadRows
from distributed import parallel
from distributed.sharding import DTYPES
from judging.labels import Text
from judging.settings import LabelSettings
from modeling import attention
from utils import (
    UserError,
    console,
    fingerprint,
    in_words,
    json_lines_file,
    log_lines,
    progress_bar,
    valid_unicode,
    write_log_lines,
)


class RewardModel:
    """A reward model in this process. Every rank holds all of it and scores its share of the batches."""

    def __init__(
        self, config: LabelSettings, folder: Path, tokenizer: Path, load_from: str | None, digest: str, as_trained: bool
    ) -> None:
        """`as_trained`: it is a run's, not a classifier by itself. Raises UserError where it is no reward model."""
        architecture = models.require_reward_model(folder, load_from, str(folder))
        models.require_positions(architecture, folder, {"model.max_length": config.model.max_length})
        self.config, self.as_trained = config, as_trained
        self.tokenizer: Tokenizer = models.load_tokenizer(tokenizer)
        self.template = tokenise.make_template(config, self.tokenizer)
        self.identity = {
            "reward_model": str((Path(load_from) if load_from else folder).resolve()),
            "weights": digest,
            "dtype": config.model.policy_dtype,
            "template": tokenise.template_name(config, self.tokenizer),
            "as_trained": as_trained,
        }
        self.scale = [digest, config.model.policy_dtype, as_trained]  # what a reward depends on beside the tokens
        self._source = (folder, load_from)
        self._architecture = architecture

    def load(self) -> PreTrainedModel:
        """The model with its weights."""
        config, (folder, load_from) = self.config.model, self._source
        dtype, device = config.policy_dtype, parallel.device()
        implementation = attention.for_sampling(config.attn_implementation, self._architecture, device, dtype)
        return models.load_model(folder, implementation, device, load_from, reward=True, dtype=DTYPES[dtype])

    def tokens(self, texts: Sequence[Text]) -> tuple[dict[int, list[int]], BadRows]:
        """The tokens of each text that has an answer, by its number; and what cannot be read."""
        readable = [text if valid_unicode([*text]) == [*text] else text._replace(answer=None) for text in texts]
        found, bad = self._tokens(readable)
        for text, kept in zip(texts, readable):
            if kept is not text:
                with bad.at(text.place):
                    raise BadRow("the prompt or the answer is not valid Unicode")
        return found, bad

    def _tokens(self, texts: Sequence[Text]) -> tuple[dict[int, list[int]], BadRows]:
        if self.as_trained or not isinstance(self.template, tokenise.ChatTemplate):
            return self._tokens_as_trained(texts)
        bad, found = BadRows("answers to score"), {}
        for number, text in enumerate(texts):
            if text.answer is None:
                continue
            with bad.at(text.place):
                talk = [*text.messages, {"role": "assistant", "content": text.answer}]
                ids = tokenise.conversation_ids(talk, self.tokenizer, self.template)
                if len(ids) > self.config.model.max_length:
                    raise BadRow(f"more tokens than model.max_length={self.config.model.max_length}")
                found[number] = ids
        return found, bad

    def _tokens_as_trained(self, texts: Sequence[Text]) -> tuple[dict[int, list[int]], BadRows]:
        records = [
            {
                "prompt": text.messages,
                "completions": [text.answer],
                "desirable": None,
                "score": None,
                "truncation_mode": "keep_end",
                "source": text.place,
                "data_set": str(number),
            }
            for number, text in enumerate(texts)
            if text.answer is not None
        ]
        model = self.config.model
        limits = {"max_length": model.max_length, "max_prompt_length": model.max_prompt_length}
        rows, tally = tokenise.tokenise(records, self.tokenizer, self.template, **limits)
        return {int(row["data_set"]): row["prompt_ids"] + row["completion_ids"][0] for row in rows}, tally.left_out

    def rewards(self, model: PreTrainedModel, sequences: Sequence[list[int]]) -> list[float]:
        """The reward of each sequence of tokens, in one forward pass."""
        device, padding = parallel.device(), self.padding(model)
        if self.as_trained:
            records = [
                {"prompt_ids": ids[:-1], "completion_ids": [ids[-1:]], "index": i} for i, ids in enumerate(sequences)
            ]
            batch = collate(records, "padded", pad_id=padding, eos_id=cast(int, self.tokenizer.eos_token_id))
            return models.score_rewards(model, batch.to(device)).rewards.tolist()
        width = max(map(len, sequences))
        ids = torch.tensor([[*own, *[padding] * (width - len(own))] for own in sequences], device=device)
        mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in sequences], device=device)
        return cast(Any, model)(input_ids=ids, attention_mask=mask).logits.float().squeeze(1).tolist()

    def padding(self, model: PreTrainedModel) -> int:
        """The token that fills up rows: the one that the model passes over when it looks for the last token."""
        own = model.config.get_text_config().pad_token_id
        return cast(int, self.tokenizer.pad_token_id if own is None else own)

    @torch.no_grad()
    def score(self, texts: Sequence[Text], log_file: Path) -> tuple[list[float | None], BadRows]:
        """The reward of each text, None for one that cannot be read; those in the log file are not computed again.

        For all ranks to call; batches do not depend on their number. Raises UserError for rewards that are no numbers.
        """
        tokens, bad = self.tokens(texts)
        key_of = {number: fingerprint(self.scale, ids) for number, ids in tokens.items()}
        by_key = {key: tokens[number] for number, key in key_of.items()}
        keys, sequences = list(by_key), list(by_key.values())
        batches = batches_by_length([len(ids) for ids in sequences], self.batch_size())
        with reward_log(log_file) as log:
            known = parallel.from_rank_zero(lambda: {key: log.rewards[key] for key in keys if key in log.rewards})
            missing = [batch for batch in batches if not all(keys[i] in known for i in batch)]
            model = self.load() if missing else None
            with progress_bar("scoring", len(keys), len(known)) as advance:
                for start in range(0, len(missing), parallel.world_size()):
                    own = missing[start : start + parallel.world_size()][parallel.rank() :][:1]
                    found: dict[str, float] = {}
                    for batch in own:
                        assert model is not None
                        found |= zip((keys[i] for i in batch), self.rewards(model, [sequences[i] for i in batch]))
                    for part in parallel.gather_objects(found):
                        log.add(part)
                        known |= part
                    advance(len(known), None)
        return [known[key_of[number]] if number in key_of else None for number in range(len(texts))], bad

    def batch_size(self) -> int:
        """How many sequences at a time: one, where the model names no token to fill up rows with."""
        named = self._architecture.get_text_config().pad_token_id is not None
        return self.config.model.eval_batch_size if self.as_trained or named else 1


class RewardLog:
    """The rewards so far, by key, a JSON line each."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self.file = file
        self.rewards: dict[str, float] = {}
        damaged = 0
        for line in log_lines(file or []):
            match line:
                case {"key": str(key), "reward": float(reward)} if math.isfinite(reward):
                    self.rewards[key] = reward
                case _:
                    damaged += 1
        if damaged:
            console.print(f"{damaged} damaged or incomplete line(s) in the log of rewards: computed again")

    def add(self, rewards: Mapping[str, float]) -> None:
        """Keep rewards, on disk first. Raises UserError for one that is no number."""
        if not all(map(math.isfinite, rewards.values())):
            raise UserError("a reward is not a number (NaN): the model's weights, or model.policy_dtype, are at fault")
        if self.file is not None:
            write_log_lines(self.file, *({"key": key, "reward": reward} for key, reward in rewards.items()))
        self.rewards |= rewards


@contextlib.contextmanager
def reward_log(path: Path) -> Iterator[RewardLog]:
    """The log in a file, which rank 0 alone reads and writes. Raises UserError where another process writes it, or this
    one cannot."""
    files: list[IO[bytes]] = []
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            try:
                files.append(stack.enter_context(json_lines_file(path)))
            except OSError as error:
                raise UserError(f"cannot write {path}: {in_words(error)}") from error

        parallel.from_rank_zero(begin)
        yield RewardLog(files[0] if files else None)
