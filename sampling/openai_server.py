"""A client for OpenAI's API and compatible servers: the key, retries, the pace of requests, rejected parameters."""

import os
import re
import time
from collections.abc import Mapping
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import openai

from utils import UserError, console

GIVE_UP_AFTER = 20  # failed requests in a row: then the server or the key is wrong, not the requests


def key_from_environment() -> str:
    """The value of OPENAI_API_KEY, or "". Raises UserError if it cannot be a key."""
    key = os.environ.get("OPENAI_API_KEY", "")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("OPENAI_API_KEY is not a key: it holds a space, a line break or a character outside ASCII")
    return key


class Server:
    """OpenAI's own service, or the server at `base_url`.

    After a time-out, a lost connection, a rate limit or a server error, the client retries up to five times and waits
    longer each time. Chat requests start at least `pause` seconds apart. The key is never printed or saved.
    """

    def __init__(self, base_url: str | None, key: str, *, timeout: float, pause: float = 0) -> None:
        """Raises UserError for a base_url that is not an HTTP address, or that holds a password or a query."""
        address = urlsplit(base_url or "")
        if base_url is not None and (address.scheme not in ("http", "https") or "@" in address.netloc or address.query):
            raise UserError(
                "write a server's address as base_url=http://HOST:PORT/v1, without a key or a password; "
                "put the key into OPENAI_API_KEY"
            )
        self.client = openai.OpenAI(api_key=key or "none", base_url=base_url, max_retries=5, timeout=timeout)
        self.refused_parameters: list[str] = []  # request parameters that the model rejected
        self._key, self._pause, self._next_start = key, pause, 0.0
        self._lock = Lock()

    def chat(self, request: dict[str, Any], optional: Mapping[str, str]) -> Any:
        """The response of /chat/completions, not checked: servers may send anything. Raises openai.OpenAIError.

        `optional`: parameters that the model may reject, each with a note on what happens then. After a rejection the
        request is sent again without the parameter (`max_tokens` becomes `max_completion_tokens`), and the note is
        printed once.
        """
        while True:
            refused = list(self.refused_parameters)
            adapted = {name: value for name, value in request.items() if name not in refused}
            if "max_tokens" in refused:
                adapted["max_completion_tokens"] = request["max_tokens"]
            self._wait_for_a_turn()
            try:
                return self.client.chat.completions.create(**adapted)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                message = str(error)
                named = [name for name in optional if f"'{name}'" in message and name not in refused]
                if not named or "nsupported" not in message:
                    raise
                self._stop_sending(named[0], f"{request['model']} does not accept {named[0]}: {optional[named[0]]}")

    def _stop_sending(self, name: str, note: str) -> None:
        with self._lock:
            if name not in self.refused_parameters:
                self.refused_parameters.append(name)
                console.print(note, style="yellow", markup=False)

    def _wait_for_a_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + self._pause
        time.sleep(start - now)

    def reason(self, error: Exception) -> str:
        """The error's message and cause, without the key."""
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return self.redact(f"{error}{cause}")

    def redact(self, text: str) -> str:
        """The text without the key, because servers may quote it in error messages and elsewhere.

        Real keys are long. A short key (`EMPTY`, `x`) is a placeholder and may be part of an answer, so it stays.
        """
        return text.replace(self._key, "[key]") if len(self._key) >= 16 else text
