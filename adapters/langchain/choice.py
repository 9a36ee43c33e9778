"""A tool that answers a multiple-choice question by a graph of frozen models, with calibrated probabilities."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from rc_agents.graph import LatentGraph, Question, load


class Asked(BaseModel):
    """What the tool takes."""

    question: str = Field(min_length=1, description="The question.")
    choices: list[str] = Field(min_length=2, description="The possible answers, two or more.")


class MultipleChoice(BaseTool):
    """Answers a multiple-choice question: the choice, and the probability of each.

    Example:
        `tool = MultipleChoice(graph="path/to/a/trained/graph")`, then `agent = create_agent(model, [tool])`.

    Args:
        graph: a trained graph, its folder or its hub id; loaded at the first call.
        sure: probability below which the answer says that it is unsure.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = "multiple_choice"
    description: str = (
        "Answers a question with two or more possible answers. Returns the most likely answer and a calibrated "
        "probability for each."
    )
    args_schema: Any = Asked
    graph: Any
    sure: float = 0.5
    _loaded: LatentGraph | None = PrivateAttr(default=None)

    def _run(self, question: str, choices: list[str], **ignored: Any) -> dict[str, Any]:
        if self._loaded is None:
            self._loaded = self.graph if isinstance(self.graph, LatentGraph) else load(self.graph)
        found = self._loaded.choose([Question(question, tuple(choices), 0)])[0]
        likely = dict(zip(choices, (round(one, 4) for one in found.probabilities), strict=True))
        return {
            "answer": found.text,
            "probabilities": likely,
            "unsure": max(found.probabilities) < self.sure,
        }

    async def _arun(self, question: str, choices: list[str], **ignored: Any) -> dict[str, Any]:
        return await asyncio.to_thread(self._run, question, choices)
