"""The quickstart does what the README says of it, also with another seed than its own (test_commands.py)."""

import json

import pytest
from conftest import command


@pytest.mark.slow
def test_fpo_works_with_another_seed(tmp_path):
    """Better than the start by more than chance."""
    command("train.py", "experiment=quickstart", "seed=2", f"cache_dir={tmp_path}")
    figures = json.loads((tmp_path / "quickstart/summary.json").read_text())
    assert figures["accuracy_after"] > figures["accuracy_before"] + 0.1
    assert figures["win_rate_low"] > 0.55
