"""One worker for all visitors: fair, with positions, and every order can be called off.

Knows nothing of what is computed, and imports no PyTorch.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from logging import DEBUG, ERROR
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, Literal

from sgm.errors import let_go

if TYPE_CHECKING:
    from sgm.serving.reporting import RunProgress

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Work = Callable[["Ticket"], Any]

_EXPECTED = ValueError, OSError, MemoryError  # errors that visitors are told of, and may mend


class Cancelled(Exception):  # noqa: N818 - asked for, not an error
    """The order was called off before it was done."""


class Ticket:
    """A visitor's order: where it stands, and what came of it. Made by :meth:`Queue.submit`.

    Attributes:
        visitor: whose it is.
        progress: how far the run is, set by the work.
        error: what the run raised.
    """

    def __init__(self, queue: "Queue", visitor: str, work: Work) -> None:
        self.visitor = visitor
        self.progress: RunProgress | None = None
        self.error: BaseException | None = None
        self._queue, self._work = queue, work
        self._state: State = "waiting"
        self._called_off = False
        self._watchers = 0
        self._touched = queue.clock()
        self._result: Any = None

    @property
    def state(self) -> State:
        """What has become of it."""
        return self._queue.look_up(self)

    @property
    def position(self) -> int | None:
        """Its place in the queue, 1 for the next; None where it does not wait."""
        return self._queue.position(self)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: done, failed or cancelled."""
        return self.state not in ("waiting", "running")

    @property
    def cancelled(self) -> bool:
        """Whether the work is to stop: it was called off, or nobody asks for it any more."""
        return self._called_off or self._queue.is_abandoned(self)

    def cancel(self) -> None:
        """Call it off: at once while it waits; the work stops as soon as it looks at `cancelled`.

        Does nothing once it is finished.
        """
        self._queue.cancel(self)

    def touch(self) -> None:
        """Say that somebody still wants it."""
        self._touched = self._queue.clock()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is finished, for so many seconds at most; whether it is."""
        return self._queue.wait(self, timeout)

    def result(self) -> Any:
        """What the work gave, waiting for it.

        Raises:
            Cancelled: it was called off.
            Exception: what the work raised.
        """
        self.wait()
        if self._state == "cancelled":
            raise Cancelled("the order was called off")
        if self.error is not None:
            raise self.error
        return self._result


class Queue:
    """Orders of several visitors, done one by one in a thread of its own.

    Visitors take turns; the orders of one are done as they came. So nobody waits for more than one
    order of each other visitor before each of theirs.

    Args:
        max_waiting: orders that may wait in all.
        max_each: orders of one visitor that may wait.
        abandoned_seconds: an order that has not been touched for so long, and that nobody waits
            for, is called off.
        clock: seconds.
    """

    def __init__(
        self,
        max_waiting: int = 20,
        max_each: int = 3,
        abandoned_seconds: float = 180.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._max_waiting, self._max_each = max_waiting, max_each
        self._abandoned_seconds = abandoned_seconds
        # By visitor, whose turn is next first; nobody is in it without an order.
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._running: Ticket | None = None
        self._closed = False
        self._changed = Condition()
        self._worker = Thread(target=self._work, name="queue", daemon=True)
        self._worker.start()

    def submit(self, visitor: str, work: Work) -> Ticket:
        """Put an order into the queue.

        Args:
            visitor: whose it is.
            work: what to do; called with the ticket, in the queue's thread. It looks at
                ``ticket.cancelled`` now and then, and raises to stop.

        Raises:
            ValueError: the queue is full, or closed.
        """
        with self._changed:
            self._sweep()
            self._refuse(visitor)
            ticket = Ticket(self, visitor, work)
            self._waiting.setdefault(visitor, deque()).append(ticket)
            self._changed.notify_all()
            return ticket

    def close(self) -> None:
        """Call everything off and end the thread, once the running work has stopped."""
        with self._changed:
            self._closed = True
            tickets = [ticket for tickets in self._waiting.values() for ticket in tickets]
            if self._running:
                tickets.append(self._running)
            for ticket in tickets:
                self.cancel(ticket)
            self._changed.notify_all()
        self._worker.join()

    def look_up(self, ticket: Ticket) -> State:
        """A ticket's state, after the abandoned ones have been taken out."""
        with self._changed:
            self._sweep()
            return ticket._state

    def position(self, ticket: Ticket) -> int | None:
        """A ticket's place in the order in which they will be done, from 1."""
        with self._changed:
            self._sweep()
            if ticket._state != "waiting":
                return None
            mine = self._waiting[ticket.visitor].index(ticket)
            before, passed = 0, False
            for visitor, tickets in self._waiting.items():
                # Who is before me in the circle has had one turn more when mine comes.
                passed = passed or visitor == ticket.visitor
                before += min(len(tickets), mine if passed else mine + 1)
            return before + 1

    def is_abandoned(self, ticket: Ticket) -> bool:
        """Whether nobody has asked for a ticket for too long."""
        asleep = self.clock() - ticket._touched
        return not ticket._watchers and asleep > self._abandoned_seconds

    def cancel(self, ticket: Ticket) -> None:
        """See :meth:`Ticket.cancel`."""
        with self._changed:
            if ticket._state == "waiting":
                self._take_out(ticket)
            elif ticket._state == "running":
                ticket._called_off = True

    def wait(self, ticket: Ticket, timeout: float | None) -> bool:
        """See :meth:`Ticket.wait`."""
        with self._changed:
            ticket._watchers += 1
            try:
                return self._changed.wait_for(
                    lambda: ticket._state not in ("waiting", "running"), timeout
                )
            finally:
                ticket._watchers -= 1
                ticket.touch()

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _refuse(self, visitor: str) -> None:
        if self._closed:
            raise ValueError("the queue is closed")
        if len(self._waiting.get(visitor, ())) >= self._max_each:
            raise ValueError(
                f"{self._max_each} of your orders wait already: let one be done, or cancel it"
            )
        if self._count() >= self._max_waiting:
            raise ValueError(f"the queue is full ({self._max_waiting} orders): try again later")

    def _sweep(self) -> None:
        """Take out what nobody waits for any more."""
        for tickets in list(self._waiting.values()):
            for ticket in [each for each in tickets if self.is_abandoned(each)]:
                self._take_out(ticket)

    def _take_out(self, ticket: Ticket) -> None:
        tickets = self._waiting[ticket.visitor]
        tickets.remove(ticket)
        if not tickets:
            del self._waiting[ticket.visitor]
        ticket._called_off = True
        self._finish(ticket, "cancelled")

    def _finish(self, ticket: Ticket, state: State) -> None:
        ticket._state = state
        ticket._work = _nothing  # which may hold pictures
        self._changed.notify_all()

    def _work(self) -> None:
        """What the thread does."""
        while (ticket := self._next()) is not None:
            state: State = "done"
            try:
                ticket._result = ticket._work(ticket)
            except BaseException as error:  # it is raised again where the result is asked for
                state = "cancelled" if ticket.cancelled else "failed"
                told = state == "cancelled" or isinstance(error, _EXPECTED)
                logger.log(DEBUG if told else ERROR, "an order ended early", exc_info=True)
                let_go(error)
                ticket.error = None if state == "cancelled" else error
            with self._changed:
                self._running = None
                self._finish(ticket, state)

    def _next(self) -> Ticket | None:
        """Wait for the next order; None when the queue is closed."""
        with self._changed:
            while True:
                self._sweep()
                if self._waiting:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            visitor, tickets = self._waiting.popitem(last=False)
            ticket = tickets.popleft()
            if tickets:
                self._waiting[visitor] = tickets  # at the end: the others' turns come first
            ticket._state, self._running = "running", ticket
            return ticket


def _nothing(_ticket: Ticket) -> None:
    """Stands for work that is over."""
