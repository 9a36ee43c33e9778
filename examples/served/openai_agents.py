"""OpenAI's Agents SDK over a served ensemble: the answer is a call whose name and arguments are guided.

Needs: pip install openai-agents, and a server: rc-agents serve package:demo
"""

import os
import sys
from typing import Literal

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool
from agents import set_tracing_disabled as keep_traces_here
from openai import APIConnectionError, AsyncOpenAI

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
CODES = {"A20": "Plague", "J10": "Influenza", "B05": "Measles"}


@function_tool
def title_of_code(code: Literal["A20", "J10", "B05"]) -> str:
    """Looks up the title of an ICD-10-CM code."""
    return CODES[code]


def main() -> None:
    """Asks one question and prints what the tool found."""
    keep_traces_here(True)
    client = AsyncOpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    agent = Agent(
        "coder",
        instructions="Look codes up.",
        model=OpenAIChatCompletionsModel("rc", client),  # or rc:NAME, a specialist alone
        tools=[title_of_code],
        model_settings=ModelSettings(tool_choice="required", max_tokens=128),
        tool_use_behavior="stop_on_first_tool",
    )
    print(Runner.run_sync(agent, "What does A20 stand for?").final_output)


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError:
        sys.exit(f"nobody answers at {URL}; run: rc-agents serve package:demo")
