"""What errors hold on to."""

import traceback
import weakref

import torch

from sgm.device import memory_errors
from sgm.errors import let_go


def fail(held, kind=ValueError):
    tensor = torch.ones(3)
    held.append(weakref.ref(tensor))
    raise kind("out of memory")


def test_an_error_lets_go_of_the_variables_of_its_causes_too():
    held = []
    try:
        try:
            fail(held)
        except ValueError as cause:
            raise OSError("second") from cause
    except OSError as error:
        kept = error
    assert held[0]() is not None
    let_go(kept)
    assert held[0]() is None
    assert "raise kind" in "".join(traceback.format_exception(kept))


def test_a_lack_of_memory_holds_none():
    """Catches tensors of the failed attempt that live as long as the error is looked at."""
    held = []
    try:
        with memory_errors("try less"):
            fail(held, torch.OutOfMemoryError)
    except MemoryError:
        assert held[0]() is None
