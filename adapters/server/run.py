"""Running an app so that a stop is told to those who wait."""

from __future__ import annotations

from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """uvicorn, whose stop begins with the batcher's: what waits is refused at once, what runs has its grace.

    uvicorn itself tells an app only when all requests have ended or were cut off.
    """

    _stopping = False

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


def server(app: Any, **options: Any) -> Server:
    """Returns a server for an app of `create_app`.

    Args:
        app: as it was made.
        options: of `uvicorn.Config`: host, port, log_level, ...
    """
    grace = int(app.state.serving.limits.grace_seconds) + 5
    return Server(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options))
