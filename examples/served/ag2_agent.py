"""An AG2 agent over a served ensemble, whose answer is an object.

Needs: pip install 'ag2[openai]', and a server: rc-agents serve package:demo
"""

import asyncio
import os
import sys
from typing import Literal

from ag2 import Agent
from ag2.config import OpenAIConfig
from openai import APIConnectionError
from pydantic import BaseModel

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")


class Illness(BaseModel):
    """An illness that a code stands for."""

    code: Literal["A20", "J10", "B05"]
    title: Literal["Plague", "Influenza", "Measles"]


async def main() -> None:
    """Asks one question and prints the object."""
    config = OpenAIConfig(model="rc", base_url=URL, api_key=KEY, max_tokens=64)
    agent = Agent("coder", prompt="You know ICD-10-CM.", config=config, response_schema=Illness)
    reply = await agent.ask("What does A20 stand for?")
    print(repr(await reply.content()))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except APIConnectionError:
        sys.exit(f"nobody answers at {URL}; run: rc-agents serve package:demo")
