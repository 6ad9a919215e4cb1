"""Checkpoints: files and folders to tensors, tensors into a model, and what a file is."""

from sgm.checkpoint.digest import known_sha256, sha256_of
from sgm.checkpoint.identify import identify
from sgm.checkpoint.loading import LoadReport, compare, load_checkpoint
from sgm.checkpoint.opening import open_checkpoint, open_native
from sgm.checkpoint.reading import read_state_dict
from sgm.checkpoint.source import Source

__all__ = [
    "LoadReport",
    "Source",
    "compare",
    "identify",
    "known_sha256",
    "load_checkpoint",
    "open_checkpoint",
    "open_native",
    "read_state_dict",
    "sha256_of",
]
