"""An AutoGen team over one served ensemble: the generalist drafts, everybody together revises.

Needs: pip install autogen-agentchat 'autogen-ext[openai]', and a server: rc-agents serve package:demo
"""

import asyncio
import os
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")
KNOWS = {"function_calling": True, "json_output": True, "structured_output": True}
INFO = {**KNOWS, "vision": False, "family": "unknown"}


def served(model: str) -> OpenAIChatCompletionClient:
    """Returns a client of the ensemble, or of those of its models that the name says."""
    return OpenAIChatCompletionClient(
        model=model, base_url=URL, api_key=KEY, model_info=INFO, max_tokens=48
    )


async def main() -> None:
    """Lets two agents speak in turn and prints what they say."""
    drafts, revises = served("rc:none"), served("rc")
    team = RoundRobinGroupChat(
        [
            AssistantAgent("writer", drafts, system_message="Answer in one sentence."),
            AssistantAgent("reviser", revises, system_message="Correct the sentence."),
        ],
        termination_condition=MaxMessageTermination(3),
    )
    for message in (await team.run(task="What is influenza?")).messages:
        print(f"{message.source}: {message.content}")
    await drafts.close()
    await revises.close()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except RuntimeError as error:  # what went wrong with an agent, its traceback behind it
        sys.exit(f"{URL}: {str(error).splitlines()[0]}; is it served? rc-agents serve package:demo")
