"""How a run is told to stop: SIGTERM, as clusters send it, and SIGINT (Ctrl-C)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STOP = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 - no error: the state is saved
    """A run ended early because it was told to.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is not empty once a signal came, so that the step in work can be finished.

    A second signal does what it did before. In a thread, where none arrive, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    kept = {number: signal.getsignal(number) for number in _STOP}

    def restore() -> None:
        for number, handler in kept.items():
            signal.signal(number, handler)

    def receive(number: int, _: object) -> None:
        received.append(number)
        restore()

    for number in _STOP:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def outlive_signals(_worker: int) -> None:
    """Let a loading process go on when its whole group is told to stop: the last step needs it."""
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)
