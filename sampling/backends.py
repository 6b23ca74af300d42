"""Who writes the completions: a model in this process, vLLM, or a server that speaks OpenAI's protocol.

A back-end turns records (dataloader.prompt_records) into requests, and requests into samples, which it gives as they
come: by the place of their request, in whatever groups and order.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import openai
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.distributed import DistributedConfig

import models
from data import tokenise
from distributed import parallel
from distributed.sharding import DTYPES
from modeling import attention
from modeling.weights import find_weights
from sampling import openai_server
from sampling.generate import Decoding, Request, Sample, before_stop, sample_batches
from sampling.openai_server import GIVE_UP_AFTER
from sampling.settings import SamplingSettings
from utils import UserError, console

BACKENDS = ("transformers", "vllm", "openai")


class Backend(Protocol):
    """What all of them can do."""

    def requests(self, records: Sequence[dict[str, Any]], temperatures: Sequence[float], draw: int) -> list[Request]:
        """A request for each record, the draw-th of its prompt."""

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[dict[int, Sample]]:
        """Samples by the place of their request."""


class LocalPrompts:
    """Requests in tokens, for a model whose tokenizer is here."""

    def __init__(self, config: SamplingSettings, tokenizer: Tokenizer, control_tokens: Sequence[str]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.template = tokenise.make_template(config, tokenizer)
        self.control = [tokenizer.encode(token, add_special_tokens=False)[0] for token in control_tokens]

    def requests(self, records: Sequence[dict[str, Any]], temperatures: Sequence[float], draw: int) -> list[Request]:
        """Prompts as in training, with the first control token, if any. Says how many are cut to max_prompt_length."""
        limit = self.config.model.max_prompt_length
        rows = tokenise.tokenise_prompts(records, self.tokenizer, self.template, max_prompt_length=limit)
        cut = sum(row["is_cut"] for row in rows)
        if cut and draw == 0:
            console.print(f"{cut} of {len(rows)} prompts are cut to model.max_prompt_length={limit}", style="yellow")
        return [
            Request([*row["prompt_ids"], *self.control[:1]], temperature, draw, row["prompt"], record["prompt"])
            for row, record, temperature in zip(rows, records, temperatures, strict=True)
        ]


class TransformersBackend(LocalPrompts):
    """A model in this process: `model.eval_batch_size` prompts at a time."""

    def __init__(
        self,
        config: SamplingSettings,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        control_tokens: Sequence[str] = (),
    ) -> None:
        super().__init__(config, tokenizer, control_tokens)
        self.model = model

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[dict[int, Sample]]:
        """As Backend's."""
        size = self.config.model.eval_batch_size
        yield from sample_batches(self.model, self.tokenizer, requests, settings, batch_size=size, never=self.control)


def load_policy(config: SamplingSettings, folder: Path, load_from: str | None) -> PreTrainedModel:
    """The model to sample from, its weights in `model.policy_dtype`, on one device, or on all of torchrun's ranks.

    Raises UserError where tensor parallelism cannot be had.
    """
    name, dtype = config.model.policy_dtype, DTYPES[config.model.policy_dtype]
    architecture = models.load_config(folder)
    implementation = attention.for_sampling(config.model.attn_implementation, architecture, parallel.device(), name)
    if not config.tensor_parallel:
        return models.load_model(folder, implementation, parallel.device(), load_from, dtype=dtype)
    if "WORLD_SIZE" not in os.environ:
        raise UserError("tensor_parallel=true: start it with `torchrun --nproc_per_node=GPUS eval.py ...`")
    weights = folder if load_from is None else find_weights(load_from)
    if weights.is_file():
        raise UserError(f"tensor_parallel=true reads safetensors in the Hub's format, not {weights}")
    model = AutoModelForCausalLM.from_pretrained(
        weights,
        dtype=dtype,
        distributed_config=DistributedConfig(tp_plan="auto"),
        attn_implementation=implementation,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.eval()


class VLLMBackend(LocalPrompts):
    """vLLM in this process, for a model in the Hub's format."""

    CHUNK = 1024  # requests between two looks at what is done; vLLM batches them by itself

    def __init__(
        self, config: SamplingSettings, folder: Path, tokenizer: Tokenizer, control_tokens: Sequence[str]
    ) -> None:
        super().__init__(config, tokenizer, control_tokens)
        try:
            import vllm
        except ImportError as error:
            raise UserError("backend=vllm: vLLM is not installed; pip install -e '.[vllm]'") from error
        self.vllm = vllm
        gpus = torch.cuda.device_count() if config.tensor_parallel else 1
        dtype = config.model.policy_dtype
        self.engine = vllm.LLM(model=str(folder), dtype=dtype, seed=config.seed, tensor_parallel_size=gpus)

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[dict[int, Sample]]:
        """As Backend's."""
        for start in range(0, len(requests), self.CHUNK):
            chunk = requests[start : start + self.CHUNK]
            outputs = self.engine.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in chunk],
                [self.parameters(request, settings) for request in chunk],
                use_tqdm=False,
            )
            completions = [output.outputs[0] for output in outputs]
            yield {
                start + place: Sample(done.text.strip(), list(done.token_ids), done.finish_reason)
                for place, done in enumerate(completions)
            }

    def parameters(self, request: Request, settings: Decoding) -> Any:
        """One request's vllm.SamplingParams."""
        return self.vllm.SamplingParams(
            temperature=request.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            max_tokens=settings.max_new_tokens,
            stop=list(settings.stop),
            seed=request.seed(settings.seed) % 2**31,
            logit_bias=dict.fromkeys(self.control, -100.0) or None,
        )


class ServerBackend:
    """A server that speaks OpenAI's protocol, `model.eval_batch_size` requests at a time.

    With template=tulu it is sent the prompt as text (/completions); else the conversation (/chat/completions), which it
    renders and cuts itself.
    """

    def __init__(self, config: SamplingSettings, timeout: float = 600) -> None:
        """Raises UserError for a server that cannot be asked."""
        self._server = openai_server.Server(
            config.base_url or "", openai_server.key_from_environment(), timeout=timeout
        )
        self.config = config
        self.model = config.served_model or self._only_model()

    def requests(self, records: Sequence[dict[str, Any]], temperatures: Sequence[float], draw: int) -> list[Request]:
        """Prompts as text and as conversations; how many tokens they are, the server knows."""
        config, chat = self.config, self.config.template != "tulu"
        prompts = [record["prompt"] for record in records]
        template = tokenise.prefix_template(config)
        texts = ["\n\n".join(turn["content"] for turn in p) if chat else template.prompt(p) for p in prompts]
        return [
            Request((), temperature, draw, text, messages)
            for text, messages, temperature in zip(texts, prompts, temperatures, strict=True)
        ]

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[dict[int, Sample]]:
        """As Backend's. Raises UserError where requests failed for good, once all the others are there; when
        GIVE_UP_AFTER of them (or all, if they are fewer) failed in a row, it waits only for those under way."""
        failures: list[str] = []
        in_a_row = 0
        pool = ThreadPoolExecutor(self.config.model.eval_batch_size)
        try:
            futures = {pool.submit(self._ask, request, settings): i for i, request in enumerate(requests)}
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                answer = future.result()
                if isinstance(answer, Sample):
                    in_a_row = 0
                    yield {futures[future]: answer}
                else:
                    failures.append(answer)
                    in_a_row += 1
                    if in_a_row == GIVE_UP_AFTER:
                        for waiting in futures:
                            waiting.cancel()
        finally:
            pool.shutdown(cancel_futures=True)
        if failures:
            raise UserError(
                f"{len(failures)} requests to {self.config.base_url} failed, the last: {failures[-1]}\n"
                "Check the server, served_model and OPENAI_API_KEY; a rerun asks only what is missing."
            )

    def _ask(self, request: Request, settings: Decoding) -> Sample | str:
        """The completion, or why there is none."""
        messages: Any = list(request.messages)
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": request.seed(settings.seed) % 2**31,
            **({"stop": list(settings.stop)} if settings.stop else {}),
            **({"extra_body": {"top_k": settings.top_k}} if settings.top_k else {}),
        }
        try:
            if self.config.template != "tulu":
                choice: Any = self._server.chat(body | {"messages": messages}, optional(body)).choices[0]
                text = choice.message.content
            else:
                choice = self._server.client.completions.create(prompt=request.prompt, **body).choices[0]
                text = choice.text
            reason = choice.finish_reason
        except openai.OpenAIError as error:
            return self._server.reason(error)
        except (AttributeError, IndexError, TypeError, ValueError):  # the client does not check what a server sends
            return "what it sent is not a completion"
        if not isinstance(text, str) or reason not in ("stop", "length"):
            return f"it sent no text (finish_reason: {reason})"
        return Sample(before_stop(self._server.redact(text), settings.stop)[0].strip(), [], reason)

    def _only_model(self) -> str:
        try:
            names = [model.id for model in self._server.client.with_options(max_retries=1).models.list().data]
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.config.base_url} does not say which models it has ({self._server.redact(str(error))}); "
                "name one with served_model="
            ) from None
        if len(names) != 1:
            raise UserError(f"served_model= has to name one of {self.config.base_url}'s models: {', '.join(names)}")
        return names[0]


def optional(body: dict[str, Any]) -> dict[str, str]:
    """Parameters that a reasoning model may refuse without anything else being drawn, and what that means."""
    neutral = [name for name in ("temperature", "top_p") if body[name] == 1]
    return {
        "max_tokens": "max_completion_tokens is sent instead, and bounds its reasoning too",
        **dict.fromkeys(neutral, "it is left out, being 1"),
    }
