"""A server of the tests, in a thread of this process, on a free port of loopback."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from rc_agents.adapters.server import create_app
from rc_agents.adapters.server import server as make_server


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: without a slash at its end.
        app: behind it.
        stop: ends it as a signal would, and waits.
    """

    url: str
    app: Any
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def batcher(self) -> Any:
        return self.app.state.serving.batcher

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@contextlib.contextmanager
def running(model: Any, **options: Any) -> Iterator[Running]:
    app = create_app(model, **options)
    server = make_server(app, port=0, log_level="info")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    found = Running(f"http://127.0.0.1:{port}", app, server, thread)
    try:
        yield found
    finally:
        found.stop()
