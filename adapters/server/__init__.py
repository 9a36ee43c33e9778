"""An OpenAI-compatible server over an ensemble.

app = create_app("path/to/ensemble")        # for any ASGI server
rc-agents serve path/to/ensemble            # the same on http://127.0.0.1:8000
"""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import sse_starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"rc_agents.adapters.server needs {error.name}; run: pip install 'rc-agents[serve]'"
    ) from None

from .app import create_app
from .limits import Limits
from .run import server

__all__ = ["Limits", "create_app", "server"]
