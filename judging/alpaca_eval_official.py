"""AlpacaEval's own prompt and length-controlled win rate, from the package `alpaca-eval` (an extra of this repo).

Its regression needs the difficulty of each instruction, which the package downloads from the Hub.
"""

import re
from typing import Any

from judging.answers import Comparison
from judging.protocols import AlpacaEval, JudgeInput
from utils import Message, UserError, fingerprint

INSTRUCTIONS_DIGEST = "3e053e0aef9e138b"  # fingerprint of the 805 instructions in AlpacaEval's order
LEADERBOARD_JUDGE = "weighted_alpaca_eval_gpt4_turbo"


def import_package() -> Any:
    """The package `alpaca_eval`. Raises UserError if it cannot be imported."""
    try:
        import alpaca_eval.metrics.glm_winrate
    except ImportError as error:
        raise UserError(f"the package alpaca-eval is missing ({error}): pip install -e '.[alpaca-eval]'") from None
    return alpaca_eval


def is_official_set(comparison: Comparison) -> bool:
    """Whether the items are AlpacaEval's instructions in order: the package looks them up by row."""
    return fingerprint([item.messages[-1]["content"] for item in comparison.items]) == INSTRUCTIONS_DIGEST


def require_official_set(comparison: Comparison) -> None:
    """Raises UserError unless the package can compute this comparison's rate."""
    import_package()
    if not is_official_set(comparison):
        raise UserError(
            "--official_lc needs answers to AlpacaEval's 805 instructions in their own order; the "
            f"{len(comparison.items)} of {comparison.candidate} against {comparison.baseline} differ from these"
        )


def official_length_controlled(comparison: Comparison, preferences: dict[int, float]) -> dict[str, float]:
    """`length_controlled_winrate` and `lc_standard_error`, in per cent.

    `preferences`: item index to the preference for the candidate, 0 to 1. Raises UserError if an item has none, or if
    the package cannot get its data.
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
            "annotator": LEADERBOARD_JUDGE,
            "preference": 1 + preferences[number],
        }
        for number, item in enumerate(comparison.items)
    ]
    glm = import_package().metrics.glm_winrate
    try:
        figures = glm.get_length_controlled_winrate(annotations, save_weights_dir=None)
    except OSError as error:
        raise UserError(
            f"--official_lc: the package alpaca-eval could not get its data from the Hub: {error}"
        ) from None
    return {key: float(figures[key]) for key in ("length_controlled_winrate", "lc_standard_error")}


class OfficialPrompt(AlpacaEval):
    """AlpacaEval 2's protocol with the package's own prompt: `-p judging/alpaca_eval_official.py:OfficialPrompt`."""

    def messages(self, judge_input: JudgeInput) -> list[Message]:
        import_package()
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
        from alpaca_eval.utils import prompt_to_chatml

        prompt = (EVALUATORS_CONFIG_DIR / "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt").read_text()
        texts = (judge_input.messages[-1]["content"], *judge_input.responses)
        values = dict(zip(("instruction", "output_1", "output_2"), texts))
        return [
            {**message, "content": re.sub(r"\{(\w+)\}", lambda match: values[match[1]], message["content"])}
            for message in prompt_to_chatml(prompt)
        ]
