"""Loading at the published size: time and memory, measured by the project's own command.

Writes 4.8 GB and wants a quiet machine, so it runs only when asked for: ``pytest --slow``.
"""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "scripts/check_load.py"


@pytest.mark.slow
def test_svd_xt_loads_within_its_limits():
    # Catches: random initialisation, a second copy of the weights, a file that is read twice.
    done = subprocess.run(
        [sys.executable, str(COMMAND)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
