"""Stopping a run from outside."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator


@contextlib.contextmanager
def noting_signals(noted: list[int]) -> Generator[None]:
    """Collects SIGINT and SIGTERM; a second one ends the process.

    A handler in Python would wait for the updates that are being computed; what is written to the
    wake-up socket is read at once.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while received := reader.recv(1):
            if noted:
                os._exit(128 + received[0])
            noted.extend(received)
            name = signal.Signals(received[0]).name
            print(f"gaba-jax: {name}: stopping at the next checkpoint", file=sys.stderr)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    wakeup = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()
