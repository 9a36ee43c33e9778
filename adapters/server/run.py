"""Running an app so that a stop is told to those who wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """uvicorn, whose stop begins with the batcher's: what waits is refused at once, what runs has its grace.

    uvicorn itself tells an app only when all requests have ended or were cut off.

    Args:
        config: uvicorn's.
        told: takes the address once the server listens.
    """

    _stopping = False

    def __init__(self, config: uvicorn.Config, told: Callable[[str], None] | None = None) -> None:
        super().__init__(config)
        self._told = told

    async def startup(self, sockets: Any = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        if self._told is not None and self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._told(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    @property
    def should_exit(self) -> bool:
        """Whether a signal, or anybody, asked for the end."""
        return self._stopping

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._stopping = value
        if value:
            app: Any = self.config.app
            app.state.serving.batcher.stop()


def server(app: Any, *, told: Callable[[str], None] | None = None, **options: Any) -> Server:
    """Returns a server for an app of `create_app`.

    Args:
        app: as it was made.
        told: takes the server's address once it listens, with the port that was free where 0 was asked for.
        options: of `uvicorn.Config`: host, port, log_level, ...
    """
    grace = int(app.state.serving.limits.grace_seconds) + 5
    return Server(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options), told)
