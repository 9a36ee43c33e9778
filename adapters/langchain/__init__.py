"""LangChain: a chat model and a text model over an ensemble.

chat = ChatCoupled(model="path/to/ensemble", temperature=0.2)   # loads at the first call
chat = ChatCoupled(model=rc_agents.couple(...))                 # a live ensemble
chat.invoke("Hi", specialists=["medical"], strength=0.5)
"""

try:
    import langchain_core  # noqa: F401
except ImportError:
    raise ImportError(
        "rc_agents.adapters.langchain needs langchain-core; run: pip install 'rc-agents[langchain]'"
    ) from None

from .chat import ChatCoupled
from .choice import MultipleChoice
from .llm import CoupledLLM

__all__ = ["ChatCoupled", "CoupledLLM", "MultipleChoice"]
