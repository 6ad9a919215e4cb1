"""The queue of a shared page: fairness, positions, calling off, abandoned orders."""

import logging
import random
import subprocess
import sys
import threading
import time
import weakref

import numpy
import pytest

from sgm.serving.queue import Cancelled, Queue
from tests.measured import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(clock):
    queue = Queue(max_waiting=30, max_each=5, abandoned_seconds=10, clock=clock)
    yield queue
    queue.close()


@pytest.fixture
def gate(queue):
    """Occupies the worker until it is opened, so that what a test submits waits meanwhile."""
    gate, begun = threading.Event(), threading.Event()

    def block(ticket):
        begun.set()
        gate.wait(10)

    queue.submit("doorkeeper", block)
    begun.wait(10)
    yield gate
    gate.set()


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def until_cancelled(ticket):
    """Work of endless steps."""
    until(lambda: ticket.cancelled)
    raise RuntimeError("stopped")


def test_visitors_take_turns_and_each_is_served_in_order(queue, gate):
    # Catches: first come first served, under which c would wait for all of a's orders.
    served = []
    names = ("a1", "a2", "a3", "b1", "a4", "c1", "b2")
    tickets = [queue.submit(name[0], lambda _, name=name: served.append(name)) for name in names]
    assert {ticket.state for ticket in tickets} == {"waiting"}
    gate.set()
    assert all(ticket.wait(10) for ticket in tickets)
    assert served == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_who_was_just_served_goes_to_the_end_of_the_circle(queue, gate):
    # Catches: a visitor who asks again at once and so is always first.
    served = []

    def serve(name):
        return lambda _: served.append(name)

    def come_back(ticket):
        served.append("a1")
        return queue.submit("a", serve("a2"))

    first = queue.submit("a", come_back)
    others = [queue.submit(name, serve(f"{name}1")) for name in "bc"]
    gate.set()
    assert all(ticket.wait(10) for ticket in (*others, first.result()))
    assert served.index("b1") < served.index("a2")


def test_positions_are_the_order_of_service(queue, gate):
    # Catches: positions counted as they came, and off-by-one turns of visitors before and after.
    draw, served, tickets = random.Random(0), [], []
    counts = dict.fromkeys("abcdef", 0)
    while len(tickets) < 20:
        visitor = draw.choice([name for name, count in counts.items() if count < 5])
        counts[visitor] += 1
        tickets.append(queue.submit(visitor, served.append))
    positions = {ticket: ticket.position for ticket in tickets}
    gate.set()
    for ticket in tickets:
        assert ticket.wait(10)
    assert [positions[ticket] for ticket in served] == list(range(1, 21))
    assert all(ticket.position is None for ticket in tickets)


def test_a_cancelled_order_that_waits_is_taken_out_at_once(queue, gate):
    first = queue.submit("a", lambda _: pytest.fail("it was called off"))
    second = queue.submit("b", lambda _: "done")
    first.cancel()
    assert (first.state, first.finished, second.position) == ("cancelled", True, 1)
    gate.set()
    assert second.result() == "done"
    with pytest.raises(Cancelled):
        first.result()


def test_cancelling_a_running_order_frees_the_worker(queue):
    # Catches: a cancelled run that is reported as failed, a worker that ends with it.
    running = queue.submit("a", until_cancelled)
    after = queue.submit("b", lambda _: 1)
    until(lambda: running.state == "running")
    running.cancel()
    assert running.wait(10)
    assert (running.state, running.error) == ("cancelled", None)
    assert after.result() == 1


def test_errors_reach_who_asked_and_no_one_else(queue):
    # Catches: a worker that dies of an error, or of one that is no Exception.
    def fail(ticket):
        tensor = object()
        raise MemoryError(f"too large {bool(tensor)}")

    def leave(ticket):
        raise SystemExit

    failed, left = queue.submit("a", fail), queue.submit("b", leave)
    assert queue.submit("c", lambda _: "served").result() == "served"
    assert (failed.state, left.state) == ("failed", "failed")
    with pytest.raises(MemoryError, match="too large True"):
        failed.result()


def test_a_cancel_while_an_error_is_logged_does_not_hide_it(queue, monkeypatch):
    # Catches: an order that failed without an error, whose result is None.
    def fail(ticket):
        logger = logging.getLogger("sgm.serving.queue")
        monkeypatch.setattr(logger, "log", lambda *_, **__: ticket.cancel())
        raise RuntimeError("broken")

    failed = queue.submit("a", fail)
    with pytest.raises(RuntimeError, match="broken"):
        failed.result()
    assert failed.state == "failed"


def test_an_error_holds_on_to_nothing_of_the_run(queue):
    # Catches: the tensors of a failed run in memory for as long as a page keeps its ticket.
    held = []

    def inner():
        tensor = numpy.zeros(3)
        held.append(weakref.ref(tensor))
        raise ValueError("inner")

    def fail(ticket):
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("outer") from error

    ticket = queue.submit("a", fail)
    ticket.wait(10)
    assert str(ticket.error.__cause__) == "inner"
    assert held[0]() is None


def test_orders_of_closed_pages_are_called_off(queue, gate, clock):
    # Catches: orders that nobody will see, done before those of visitors who wait.
    kept = queue.submit("a", lambda _: "kept")
    left = queue.submit("b", lambda _: pytest.fail("nobody wants it"))
    waited_for = queue.submit("c", lambda _: "waited for")
    watcher = threading.Thread(target=waited_for.wait, args=(10,))
    watcher.start()
    until(lambda: waited_for._watchers)
    clock.now = 9
    kept.touch()
    assert left.state == "waiting"
    clock.now = 11
    assert (kept.state, left.state, waited_for.state) == ("waiting", "cancelled", "waiting")
    assert [kept.position, waited_for.position] == [1, 2]
    gate.set()
    assert (kept.result(), waited_for.result()) == ("kept", "waited for")
    watcher.join()


def test_a_running_order_of_a_closed_page_stops(queue, clock):
    ticket = queue.submit("a", until_cancelled)
    until(lambda: ticket.state == "running")
    clock.now = 11
    until(lambda: ticket.finished)
    assert ticket.state == "cancelled"


def test_a_full_queue_refuses_in_one_line(clock):
    queue = Queue(max_waiting=3, max_each=2, abandoned_seconds=10, clock=clock)
    gate = threading.Event()
    blocked = queue.submit("a", lambda _: gate.wait(10))
    until(lambda: blocked.state == "running")
    for _ in range(2):
        queue.submit("a", lambda _: None)
    with pytest.raises(ValueError, match="2 of your orders wait already"):
        queue.submit("a", lambda _: None)
    queue.submit("b", lambda _: None)
    with pytest.raises(ValueError, match=r"the queue is full \(3 orders\): try again later"):
        queue.submit("c", lambda _: None)
    clock.now = 11  # abandoned orders take no place
    queue.submit("c", lambda _: None)
    gate.set()
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.submit("c", lambda _: None)


def test_close_calls_everything_off(clock):
    queue = Queue(clock=clock)
    running, waiting = (queue.submit(name, until_cancelled) for name in "ab")
    queue.close()
    assert (running.state, waiting.state) == ("cancelled", "cancelled")


def test_the_queue_needs_no_torch():
    code = "import sys, sgm.serving.queue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
