"""One generation service under every adapter: render, generate, stream, batch, count, stop, cancel.

service = GenerationService(model)
service.generate([{"role": "user", "content": "Hi"}], GenerationParams(max_new_tokens=32)).text
with service.stream("Once upon a time") as stream:
    for delta in stream: ...
"""

from .conversation import Conversation, Reply, form_of
from .guides import Guide
from .loading import load
from .media import lines
from .params import CHOICES, LIMITS, GenerationParams, settings_over
from .prompts import Prompt, PromptLike
from .requests import GenerationResult, Request
from .service import GenerationService
from .stream import TextStream, unblocked
from .tools import Tool, ToolCall, check_tools
from .trace import TokenRecord

__all__ = [
    "CHOICES",
    "LIMITS",
    "Conversation",
    "GenerationParams",
    "GenerationResult",
    "GenerationService",
    "Guide",
    "Prompt",
    "PromptLike",
    "Reply",
    "Request",
    "TextStream",
    "TokenRecord",
    "Tool",
    "ToolCall",
    "check_tools",
    "form_of",
    "lines",
    "load",
    "settings_over",
    "unblocked",
]
