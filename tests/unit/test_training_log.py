"""What a run logs."""

import json

from sgm.training.log import JsonLines


def test_a_value_that_begins_amid_a_window_is_the_mean_of_its_steps(tmp_path):
    """Catches the adversary's first values refused, or counted as zeros, in a window that began
    without them."""
    with JsonLines(tmp_path / "log.jsonl", 0, every=3) as log:
        log.add(1, {"loss": 1.0})
        log.add(2, {"loss": 2.0, "adversarial": 4.0})
        log.add(3, {"loss": 6.0, "adversarial": 8.0}, lr=0.1)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "lr": 0.1, "loss": 3.0, "adversarial": 6.0}
