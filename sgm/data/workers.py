"""A function on many items in processes of its own each, so that a crash costs one item."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PRELOADED = ["av", "cv2", "numpy"]
"""What most functions here need: imported once, not in each process."""


class Crash(Exception):  # noqa: N818 - a result, not raised
    """A process that ended without a result."""


def map_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result | Crash]]:
    """Give each item with its result, in the order in which they are finished.

    Args:
        function: found by its name in its module; so are the classes of items and results.
        items: any.
        workers: processes at a time.

    Raises:
        Exception: what ``function`` raises; the other processes are ended.
    """
    fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
    context.set_forkserver_preload([*PRELOADED, function.__module__])
    if fork:
        _start_server()
    waiting = iter(items)
    running: dict[Any, tuple[Item, BaseProcess]] = {}
    try:
        while True:
            for item in islice(waiting, workers - len(running)):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, function, item), daemon=True)
                process.start()
                sender.close()
                running[receiver] = item, process
            if not running:
                return
            for receiver in wait(running):
                item, process = running.pop(receiver)
                yield item, _receive(receiver, process)
    finally:
        for _, process in running.values():
            process.terminate()


def _start_server() -> None:
    """Start what the processes are forked from; an interruption is not for them."""
    from multiprocessing import forkserver, resource_tracker  # not on every system

    resource_tracker.ensure_running()  # before the signal is blocked, as it unblocks it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()  # with the same signals blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(sender: Connection, function: Callable[[Item], Result], item: Item) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one ends it
    try:
        result: Result | Exception = function(item)
    except Exception as error:  # noqa: BLE001 - raised again where the result is received
        result = error
    with suppress(BrokenPipeError):  # the process that waited is gone
        sender.send(result)


def _receive(receiver: Any, process: BaseProcess) -> Any:
    """Take the result, raise the error, or tell of the crash."""
    with receiver:
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Crash(f"the process that read it ended by {how}")
    process.join()
    if isinstance(result, Exception) and not isinstance(result, Crash):
        raise result
    return result
