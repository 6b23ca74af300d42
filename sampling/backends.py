"""Who writes the completions: a model in this process, vLLM, or a server that speaks OpenAI's protocol.

A back-end turns records (dataloader.prompt_records) into requests, and requests into samples, which it gives as they
come: by the place of their request, in whatever groups and order.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.distributed import DistributedConfig

import models
from data import tokenise
from distributed import parallel
from distributed.sharding import DTYPES
from modeling import attention
from modeling.adapters import ADAPTER_CONFIG
from modeling.weights import source_of
from sampling import openai_server
from sampling.generate import Decoding, Request, Sample, before_stop, finished, sample_batches
from sampling.openai_server import NoAnswer
from sampling.settings import SamplingSettings
from utils import UserError, console

BACKENDS = ("transformers", "vllm", "openai")


class Backend(Protocol):
    """What all of them can do."""

    def requests(self, records: Sequence[dict[str, Any]], temperatures: Sequence[float], draw: int) -> list[Request]:
        """A request for each record, the draw-th of its prompt."""

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[Mapping[int, Sample | NoAnswer]]:
        """Samples by the place of their request, or why there is none."""


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

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[Mapping[int, Sample | NoAnswer]]:
        """As Backend's."""
        size = self.config.model.eval_batch_size
        yield from sample_batches(self.model, self.tokenizer, requests, settings, batch_size=size, never=self.control)


def load_policy(config: SamplingSettings, folder: Path, load_from: str | None, vocabulary: int) -> PreTrainedModel:
    """The model to sample from, its weights in `model.policy_dtype`, on one device, or on all of torchrun's ranks.

    Raises UserError where tensor parallelism cannot be had.
    """
    name, dtype = config.model.policy_dtype, DTYPES[config.model.policy_dtype]
    architecture = models.load_config(folder)
    implementation = attention.for_sampling(config.model.attn_implementation, architecture, parallel.device(), name)
    if not config.tensor_parallel:
        return models.load_model(
            folder, implementation, parallel.device(), load_from, dtype=dtype, vocabulary=vocabulary
        )
    if "WORLD_SIZE" not in os.environ:
        raise UserError("tensor_parallel=true: start it with `torchrun --nproc_per_node=GPUS eval.py ...`")
    weights = source_of(folder, load_from)
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
    """vLLM in this process, for a model in the Hub's format, perhaps with an adapter in peft's."""

    CHUNK = 1024  # requests between two looks at what is done; vLLM batches them by itself
    LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for which it makes room

    def __init__(
        self,
        config: SamplingSettings,
        folder: Path,
        tokenizer: Tokenizer,
        control_tokens: Sequence[str],
        adapter: Path | None = None,
    ) -> None:
        super().__init__(config, tokenizer, control_tokens)
        try:
            import vllm
            import vllm.lora.request
        except ImportError as error:
            raise UserError("backend=vllm: vLLM is not installed; pip install -e '.[vllm]'") from error
        self.vllm = vllm
        options: dict[str, Any] = {"dtype": config.model.policy_dtype, "seed": config.seed}
        options["tensor_parallel_size"] = torch.cuda.device_count() if config.tensor_parallel else 1
        longest = config.model.max_prompt_length + len(self.control[:1]) + config.max_new_tokens
        options["max_model_len"] = int(min(longest, models.positions_of(models.load_config(folder))))
        self.asked_with: dict[str, Any] = {}
        if adapter:
            rank = json.loads((adapter / ADAPTER_CONFIG).read_text())["r"]
            options |= {"enable_lora": True, "max_lora_rank": min(r for r in self.LORA_RANKS if r >= rank)}
            self.asked_with["lora_request"] = vllm.lora.request.LoRARequest(adapter.name, 1, str(adapter))
        self.engine = vllm.LLM(model=str(folder), **options)

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[Mapping[int, Sample | NoAnswer]]:
        """As Backend's."""
        for start in range(0, len(requests), self.CHUNK):
            chunk = requests[start : start + self.CHUNK]
            outputs = self.engine.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in chunk],
                [self.parameters(request, settings) for request in chunk],
                use_tqdm=False,
                **self.asked_with,
            )
            yield {start + place: self.sample(output.outputs[0], settings) for place, output in enumerate(outputs)}

    def sample(self, done: Any, settings: Decoding) -> Sample:
        """What of a vllm.CompletionOutput is the completion."""
        own = finished(list(done.token_ids), self.tokenizer, [self.tokenizer.eos_token_id], settings)
        return Sample(own.text, own.ids, done.finish_reason)

    def parameters(self, request: Request, settings: Decoding) -> Any:
        """One request's vllm.SamplingParams."""
        return self.vllm.SamplingParams(
            temperature=request.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            max_tokens=settings.max_new_tokens,
            stop=list(settings.stop),
            skip_special_tokens=False,  # or it would not stop at texts that hold such tokens
            seed=request.seed(settings.seed) % 2**31,
            logit_bias=dict.fromkeys(self.control, -100.0) or None,
        )


class ServerBackend:
    """A server that speaks OpenAI's protocol, `model.eval_batch_size` requests at a time.

    With template=tulu it is sent the prompt as text (/completions); else the conversation (/chat/completions), which it
    renders and cuts itself.
    """

    def __init__(self, config: SamplingSettings, prompts: int, timeout: float = openai_server.TIMEOUT) -> None:
        """`prompts`: how many there are. Raises UserError for a server that cannot be asked."""
        key = openai_server.key_from_environment()
        self._server = openai_server.Server(config.base_url or "", key, timeout=timeout)
        self.config = config
        self.model = config.served_model or self._only_model()
        self._patience = max(openai_server.GIVE_UP_AFTER, config.may_fail(prompts) + 1)

    @property
    def refused_parameters(self) -> list[str]:
        """What of the settings the server does not take."""
        return self._server.refused_parameters

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

    def complete(self, requests: Sequence[Request], settings: Decoding) -> Iterator[Mapping[int, Sample | NoAnswer]]:
        """As Backend's. Raises UserError when too many requests in a row got no answer."""

        def ask(request: Request) -> Sample:
            return self._ask(request, settings)

        at_a_time = self.config.model.eval_batch_size
        for found in openai_server.ask_all(ask, requests, at_a_time, give_up_after=self._patience):
            yield dict([found] if found else [])

    def _ask(self, request: Request, settings: Decoding) -> Sample:
        """The completion. Raises NoAnswer."""
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": request.seed(settings.seed) % 2**31,
            **({"stop": list(settings.stop)} if settings.stop else {}),
            **({"top_k": settings.top_k} if settings.top_k else {}),
        }
        if self.config.template != "tulu":
            asked = {"messages": list(request.messages)}
            answer = self._server.ask("/chat/completions", body | asked, optional(body))
        else:
            answer = self._server.ask("/completions", body | {"prompt": request.prompt}, optional(body))
        if answer.refusal is not None:
            raise NoAnswer(f"it withheld the text ({answer.refusal})")
        if answer.text is None and not answer.is_cut:
            raise NoAnswer("it sent no text")
        text = before_stop(answer.text or "", settings.stop)[0].strip()
        return Sample(text, [], "length" if answer.is_cut else "stop")

    def _only_model(self) -> str:
        try:
            names = self._server.models()
        except NoAnswer as error:
            raise UserError(
                f"{self.config.base_url} does not say which models it has ({error}); name one with served_model="
            ) from None
        if len(names) != 1:
            raise UserError(f"served_model= has to name one of {self.config.base_url}'s models: {', '.join(names)}")
        return names[0]


def optional(body: dict[str, Any]) -> dict[str, str]:
    """Parameters that a server may refuse, and what that means; those first without which nothing changes."""
    notes = {
        "max_tokens": "max_completion_tokens is sent instead, and bounds its reasoning too",
        "seed": "it draws by its own, so the same command may draw other samples",
        "stop": "its answers are cut at these texts here",
        "top_k": f"it draws as it does by itself, not with {body.get('top_k')}",
        "top_p": f"it draws as it does by itself, not with {body['top_p']:g}",
        "temperature": f"it draws as it does by itself, not with {body['temperature']:g}",
    }
    neutral = {name: "it is left out, being 1" for name in ("temperature", "top_p") if body[name] == 1}
    return {**neutral, **{name: note for name, note in notes.items() if name not in neutral}}
