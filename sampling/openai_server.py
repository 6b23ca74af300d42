"""A server that speaks OpenAI's protocol: what it is asked with, how often, and what it refuses."""

import os
import re
import time
from collections.abc import Mapping
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import openai

from utils import UserError, console

GIVE_UP_AFTER = 20  # failed requests in a row: the server or the key is at fault, not what is asked


def key_from_environment() -> str:
    """OPENAI_API_KEY's value, or "". Raises UserError where it cannot be a key."""
    key = os.environ.get("OPENAI_API_KEY", "")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("OPENAI_API_KEY holds a space, a line break or a character outside ASCII; no key does")
    return key


class Server:
    """OpenAI's own service, or the one at `base_url`.

    The client tries time-outs, lost connections, rate limits and server errors again, five times with growing waits.
    Requests to chat start at least `pause` seconds apart. The key is neither printed nor kept.
    """

    def __init__(self, base_url: str | None, key: str, *, timeout: float, pause: float = 0) -> None:
        """Raises UserError for an address that is none, or that has a password in it."""
        address = urlsplit(base_url or "")
        if base_url is not None and (address.scheme not in ("http", "https") or "@" in address.netloc or address.query):
            raise UserError(
                "a server is named as base_url=http://HOST:PORT/v1, without a key or a password in it; "
                "a key belongs into OPENAI_API_KEY"
            )
        self.client = openai.OpenAI(api_key=key or "none", base_url=base_url, max_retries=5, timeout=timeout)
        self.refuses: list[str] = []  # parameters that the model turned out not to take
        self._key, self._pause, self._next_start = key, pause, 0.0
        self._lock = Lock()

    def chat(self, request: dict[str, Any], optional: Mapping[str, str]) -> Any:
        """The answer to /chat/completions. A model that refuses one of the `optional` parameters, whose values say what
        that means, is asked without it (`max_tokens` becomes `max_completion_tokens`), and a line says so.

        Raises openai.OpenAIError. What it returns is not checked: servers send all kinds of things.
        """
        while True:
            left_out = list(self.refuses)
            adapted = {name: value for name, value in request.items() if name not in left_out}
            if "max_tokens" in left_out:
                adapted["max_completion_tokens"] = request["max_tokens"]
            self._wait_for_a_turn()
            try:
                return self.client.chat.completions.create(**adapted)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                message = str(error)
                named = [name for name in optional if f"'{name}'" in message and name not in left_out]
                if not named or "nsupported" not in message:
                    raise
                self._leave_out(named[0], f"{request['model']} does not take {named[0]}: {optional[named[0]]}")

    def _leave_out(self, name: str, why: str) -> None:
        with self._lock:
            if name not in self.refuses:
                self.refuses.append(name)
                console.print(why, style="yellow", markup=False)

    def _wait_for_a_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + self._pause
        time.sleep(start - now)

    def reason(self, error: Exception) -> str:
        """What went wrong, without the key."""
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return self.redact(f"{error}{cause}")

    def redact(self, text: str) -> str:
        """The text without the key: servers quote it in error messages, and may in anything.

        Keys that open something are long; a short one (`EMPTY`, `x`) is a placeholder, and may be a word of an answer.
        """
        return text.replace(self._key, "[key]") if len(self._key) >= 16 else text
