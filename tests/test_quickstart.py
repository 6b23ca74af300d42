"""The quickstart does what the README says of it, whatever the seed (test_commands.py: its own). In a file of its own,
for it takes long."""

import json

import pytest
from conftest import command


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_fpo_works_whatever_the_seed(tmp_path, seed):
    """Better than the start by more than chance."""
    command("train.py", "experiment=quickstart", f"seed={seed}", f"cache_dir={tmp_path}")
    figures = json.loads((tmp_path / "quickstart/summary.json").read_text())
    assert figures["accuracy_after"] > figures["accuracy_before"] + 0.1
    assert figures["win_rate_low"] > 0.55
