"""What users rely on and what changes on purpose alone: the bundled model's frames, the flags.

After such a change: ``python tests/contracts/test_frozen.py`` writes the files anew.
"""

import re
from pathlib import Path

import numpy as np

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.flags import help_text
from sgm.inference.specs import ROOT

DATA = Path(__file__).parents[1] / "data" / "contracts"
OPTIONS = SamplingOptions(num_steps=6, seed=5, motion_bucket_id=100)


def bundled_frames() -> np.ndarray:
    pipeline = VideoPipeline.from_spec("svd_tiny", device="cpu", dtype="float32")
    return pipeline(ROOT / "assets" / "sample.jpg", OPTIONS).frames[::4]


def flags() -> list[str]:
    return sorted(set(re.findall(r"^  --(\w+)", help_text(100), re.MULTILINE)))


def test_the_bundled_model_gives_the_frames_it_gave():
    """Catches: other weights, another schedule, noise drawn in another order, another resize.

    Float32 sums in another order move an 8-bit value by one now and then, not by three.
    """
    recorded = np.load(DATA / "svd_tiny_frames.npy").astype(int)
    difference = np.abs(bundled_frames().astype(int) - recorded)
    assert difference.max() <= 3
    assert difference.mean() < 0.05


def test_the_flags_are_those_of_the_last_version():
    """Catches: a flag that was renamed or dropped, on which scripts of users rely."""
    assert flags() == (DATA / "flags.txt").read_text(encoding="utf-8").split()


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    np.save(DATA / "svd_tiny_frames.npy", bundled_frames())
    (DATA / "flags.txt").write_text("\n".join(flags()) + "\n", encoding="utf-8")
