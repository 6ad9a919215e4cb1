"""Checkpoints: files to tensors, tensors into a model, and what a file is."""

from sgm.checkpoint.digest import sha256_of
from sgm.checkpoint.identify import identify
from sgm.checkpoint.loading import LoadReport, compare, load_checkpoint
from sgm.checkpoint.reading import read_state_dict

__all__ = [
    "LoadReport",
    "compare",
    "identify",
    "load_checkpoint",
    "read_state_dict",
    "sha256_of",
]
