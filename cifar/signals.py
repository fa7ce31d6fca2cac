"""Signals that ask a run to stop: it finishes its step, saves, and leaves with a status that a scheduler understands."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Interrupted(KeyboardInterrupt):
    """The run saved its state and stopped because of a signal; `status` is the exit status a scheduler expects.

    Not an Exception: it ends a whole sweep, as Ctrl-C does, rather than one job of it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StopRequest:
    """The signal that asked to stop, if one did."""

    received: signal.Signals | None = None

    def __bool__(self) -> bool:
        """Whether the run is to stop after this step."""
        return self.received is not None

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM."""
        return self.received.name if self.received else "no signal"

    @property
    def status(self) -> int:
        """The exit status by convention: 128 plus the signal's number (SIGTERM: 143)."""
        return 128 + (self.received or 0)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield a request that SIGINT, SIGTERM or SIGUSR1 sets; a second SIGINT leaves at once (KeyboardInterrupt).

    Outside the main thread Python delivers no signals, and nothing is installed.
    """
    request = StopRequest()

    def ask(number: int, _: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.received = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
