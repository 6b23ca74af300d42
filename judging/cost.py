"""The cost of a judge: tokens, prices, and a spending limit."""

from threading import Lock
from typing import NamedTuple

from utils import Message, UserError

Prices = tuple[float, float]  # US dollars per million tokens: (input, output)

PRICES: dict[str, Prices] = {  # from third parties' lists of 2026, not from OpenAI
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4-1106-preview": (10.0, 30.0),
    "gpt-4": (30.0, 60.0),
    "gpt-4-0613": (30.0, 60.0),
    "gpt-5": (1.25, 10.0),
    "gpt-5-mini": (0.25, 2.0),
    "gpt-5-nano": (0.05, 0.4),
}


class TokenUsage(NamedTuple):
    """Token counts of one or more requests."""

    input: int
    output: int

    def cost(self, prices: Prices) -> float:
        """In US dollars."""
        return (self.input * prices[0] + self.output * prices[1]) / 1e6


def estimate_usage(messages: list[Message], max_tokens: int) -> TokenUsage:
    """A request's tokens, estimated before it is sent: 4 bytes of UTF-8 per token, and a reply of full length."""
    sizes = [len(message["content"].encode(errors="replace")) for message in messages]
    return TokenUsage(sum(size // 4 + 8 for size in sizes), max_tokens)


def find_prices(model: str, given: Prices | None, base_url: str | None) -> Prices | None:
    """The given prices, else the list's. None if the model is not on the list or runs on another server."""
    return given or (None if base_url else PRICES.get(model))


def price_note(prices: Prices | None, given: bool) -> str:
    """Where the prices come from, to print after a cost."""
    if prices is None:
        return "; no prices known (--prices)"
    source = "given" if given else "from a built-in list that may be out of date; set them with --prices"
    return f" (prices {source}: ${prices[0]:g} in, ${prices[1]:g} out per million tokens)"


class Budget:
    """The token usage and cost of this run's requests, with an optional limit in US dollars.

    A request may start only if the cost so far, plus the reserves of all running requests, stays within the limit.
    Without prices only tokens are counted.
    """

    def __init__(self, prices: Prices | None, limit: float | None = None) -> None:
        self.prices, self.limit = prices, limit
        self.requests, self.used = 0, TokenUsage(0, 0)
        self._reserved = 0.0
        self._lock = Lock()

    @property
    def cost(self) -> float | None:
        """US dollars spent so far; None without prices."""
        return self.used.cost(self.prices) if self.prices else None

    def reserve(self, estimate: TokenUsage) -> float:
        """Reserve dollars for a request, and return how many: the price of its longest reply and of twice its
        estimated input, which may be too low. Raises UserError if the limit leaves too little."""
        amount = TokenUsage(2 * estimate.input, estimate.output).cost(self.prices) if self.prices else 0.0
        with self._lock:
            if self.limit is not None and (self.cost or 0.0) + self._reserved + amount > self.limit:
                raise UserError(
                    f"--max_cost {self.limit:g}: stopped after {self.requests:,} requests and ${self.cost or 0:.4f}, "
                    "because the next one could exceed the limit. All verdicts are saved: run the same command again "
                    "with a higher limit to continue."
                )
            self._reserved += amount
        return amount

    def settle(self, reserved: float, used: TokenUsage | None) -> None:
        """Replace a finished request's reserve by its usage; None if it failed, and nothing shows that it cost."""
        with self._lock:
            self._reserved -= reserved
            if used is not None:
                self.requests += 1
                self.used = TokenUsage(self.used.input + used.input, self.used.output + used.output)
