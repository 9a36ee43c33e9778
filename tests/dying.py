"""A function that ends its process, as the system does where memory runs out."""

import os
import signal
from typing import Any


def dies(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
