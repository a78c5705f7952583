"""SIGTERM (batch systems) and Ctrl-C: finish the step, save, leave with one line."""

import signal
import threading


class Stopped(Exception):
    """The run was asked to stop. `exit_code` is 128 + signal number, as shells report it: the run
    is not finished."""

    def __init__(self, signum: int, where: str):
        self.signum, self.where = signum, where
        self.exit_code = 128 + signum
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        super().__init__(f"stopped by {name} {where}; continue with --resume auto")


class StopSignal:
    """Context manager that turns both signals into a flag while the loop is armed, else into
    Stopped at once.

    A second signal always raises at once, so that an impatient user is obeyed.
    """

    def __init__(self):
        self.received: int | None = None
        self.armed = False
        self._previous: dict = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame) -> None:
        if self.armed and self.received is None:
            self.received = signum
            return
        raise Stopped(signum, "between checkpoints")
