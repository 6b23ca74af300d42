"""torch.compile, so that what is compiled stays compiled."""

from collections.abc import Callable
from typing import Any

import torch

# Graphs of one function: for each sliding window, with and without gradients, of each input's own, of new lengths.
GRAPHS = 64


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile(function, **options)`. After 8 graphs of a function torch would run it uncompiled, without a word;
    after this it does so after GRAPHS."""
    import torch._dynamo.config as dynamo  # takes a second to import

    dynamo.recompile_limit = max(GRAPHS, dynamo.recompile_limit)
    return torch.compile(function, **options)
