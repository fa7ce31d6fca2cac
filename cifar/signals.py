"""Signals that ask a run to stop: it finishes its step, saves, and leaves with a status that a scheduler understands."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and it did; `status` is the exit status: 128 plus the signal's number (SIGTERM: 143).

    Not an Exception: it ends a whole sweep, as Ctrl-C does, rather than one job of it.
    """

    def __init__(self, received: signal.Signals, where: str) -> None:
        super().__init__(f"stopped by {received.name} {where}")
        self.received = received
        self.status = 128 + received

    def hand_on(self) -> None:
        """Give the signal, now that the run is saved, to whoever handles it outside of runs, if it is theirs (SIGUSR2)."""
        if self.received not in STOPPING:
            signal.raise_signal(self.received)


class Stop:
    """A request to stop, which a signal makes. It is an Interrupted at once, or, while `deferred`, a flag to be looked at."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_deferred = False

    def __bool__(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.received is not None

    def interrupted(self, where: str) -> Interrupted:
        """Return the exception with which to stop; `where` ends its message."""
        assert self.received is not None
        return Interrupted(self.received, where)

    @contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """Within this context the signal only sets the flag (or, with False, interrupts at once, also if it came before)."""
        previous, self.is_deferred = self.is_deferred, deferred
        try:
            if self and not deferred:
                raise self.interrupted("")
            yield
        finally:
            self.is_deferred = previous

    def handle(self, number: int, _: FrameType | None) -> None:
        """Take a signal; a second SIGINT leaves at once, whatever is under way."""
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not self.is_deferred:
            raise self.interrupted("between two checkpoints")


_active: Stop | None = None  # what the handlers in place set


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yield what SIGINT, SIGTERM and SIGUSR1 ask, and put the previous handlers back.

    Within another such context its Stop is yielded: jobs that train as one are stopped together.

    SIGUSR2 too, where it has a handler: submitit's, which puts a job back in the queue. It has its turn after the save.

    Outside the main thread Python delivers no signals, and nothing is installed.
    """
    global _active
    if _active is not None:
        yield _active
        return
    stop = Stop()
    stopping = list(STOPPING)
    if hasattr(signal, "SIGUSR2") and callable(signal.getsignal(signal.SIGUSR2)):
        stopping.append(signal.SIGUSR2)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.handle) for number in stopping}
    _active = stop
    try:
        yield stop
    finally:
        _active = None
        for number, handler in previous.items():
            signal.signal(number, handler)
