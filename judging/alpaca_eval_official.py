"""AlpacaEval's own prompt and length-controlled win rate, from the package `alpaca-eval` (the extra of that name).

Its regression needs the difficulty of each instruction, which the package downloads from the Hub.
"""

import re
from typing import Any

from judging.answers import Comparison
from judging.protocols import AlpacaEval, Shown
from utils import Message, UserError, fingerprint

INSTRUCTIONS_DIGEST = "3e053e0aef9e138b"  # fingerprint of the 805 instructions in the board's order
JUDGE = "weighted_alpaca_eval_gpt4_turbo"  # the board's


def package() -> Any:
    """The package `alpaca_eval`. Raises UserError where it cannot be imported."""
    try:
        import alpaca_eval.metrics.glm_winrate
    except ImportError as error:
        raise UserError(f"this needs the package alpaca-eval ({error}): pip install -e '.[alpaca-eval]'") from None
    return alpaca_eval


def require_official_set(comparison: Comparison) -> None:
    """Raises UserError where the figure cannot be computed: the package finds an instruction by its row's number."""
    package()
    instructions = [item.messages[-1]["content"] for item in comparison.items]
    if fingerprint(instructions) != INSTRUCTIONS_DIGEST:
        raise UserError(
            f"--official_lc needs answers to AlpacaEval's 805 instructions in their own order; {comparison.candidate} "
            f"against {comparison.baseline} has {len(instructions)} that are others, or in another order"
        )


def official_length_controlled(comparison: Comparison, preferences: dict[int, float]) -> dict[str, float]:
    """`length_controlled_winrate` and `lc_standard_error`, in per cent, from a preference (0 to 1) for each item.

    Raises UserError where items lack one, or where the package cannot get its data.
    """
    require_official_set(comparison)
    if len(preferences) < len(comparison.items):
        missing = len(comparison.items) - len(preferences)
        raise UserError(f"--official_lc: {missing} of {len(comparison.items)} instructions have no verdict")
    annotations = [
        {
            "instruction": item.messages[-1]["content"],
            "output_1": item.baseline,
            "output_2": item.candidate,
            "generator_1": comparison.baseline,
            "generator_2": comparison.candidate,
            "annotator": JUDGE,
            "preference": 1 + preferences[number],
        }
        for number, item in enumerate(comparison.items)
    ]
    glm = package().metrics.glm_winrate
    try:
        figures = glm.get_length_controlled_winrate(annotations, save_weights_dir=None)
    except OSError as error:
        raise UserError(
            f"--official_lc: the package alpaca-eval could not get its data from the Hub: {error}"
        ) from None
    return {key: float(figures[key]) for key in ("length_controlled_winrate", "lc_standard_error")}


class OfficialPrompt(AlpacaEval):
    """AlpacaEval 2's protocol in the package's own words: `-p judging/alpaca_eval_official.py:OfficialPrompt`."""

    def messages(self, shown: Shown) -> list[Message]:
        package()
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
        from alpaca_eval.utils import prompt_to_chatml

        prompt = (EVALUATORS_CONFIG_DIR / "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt").read_text()
        values = dict(zip(("instruction", "output_1", "output_2"), (shown.messages[-1]["content"], *shown.responses)))
        return [
            {**message, "content": re.sub(r"\{(\w+)\}", lambda place: values[place[1]], message["content"])}
            for message in prompt_to_chatml(prompt)
        ]
