"""Layouts of checkpoints: which tensor of one becomes which of another.

A conversion is planned from names and shapes, which a file's header tells, and then done tensor by
tensor, which keeps what is in memory small::

    from sgm.convert import detect, plan

    conversion = plan(shapes, source=detect(shapes), target="native")
    for entry in conversion.entries:
        write(entry.key, entry.make(*(read(name) for name in entry.sources)))

The correspondences stand in tables: see :mod:`sgm.convert.pairs` for their notation. Files are
:mod:`sgm.checkpoint`'s business.
"""

from sgm.convert.conversion import Conversion, Entry
from sgm.convert.diffusers import folder_part
from sgm.convert.diffusers.config import folder_configs
from sgm.convert.layouts import LAYOUTS, NATIVE, detect, plan

__all__ = [
    "LAYOUTS",
    "NATIVE",
    "Conversion",
    "Entry",
    "detect",
    "folder_configs",
    "folder_part",
    "plan",
]
