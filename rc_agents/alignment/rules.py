"""What a fast tokenizer's own description says about how it treats text."""

from __future__ import annotations

from typing import Any

SPACE = "\u2581"  # sentencepiece's visible space


def parts_of(rule: Any) -> list[dict[str, Any]]:
    """Returns the steps of a normaliser, pre-tokenizer or decoder rule, sequences opened."""
    if not rule:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in rule:
            return [step for part in rule[key] for step in parts_of(part)]
    return [rule]


def is_sentencepiece(decoder: dict[str, Any]) -> bool:
    """Whether a decoder turns sentencepiece's visible space into a space."""
    return any(
        step["type"] == "Metaspace"
        or (step["type"] == "Replace" and step["pattern"].get("String") == SPACE)
        for step in parts_of(decoder)
    )


def drops_first_space(decoder: dict[str, Any]) -> bool:
    """Whether a decoder takes the space before a text away again."""
    return any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in parts_of(decoder)
    )


def adds_prefix(rules: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    steps = [*parts_of(rules.get("normalizer")), *parts_of(rules.get("pre_tokenizer"))]
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        or (step["type"] == "ByteLevel" and step.get("add_prefix_space"))
        for step in steps
    )


def without_prefix(rules: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's rules in the middle of a text, where it puts no space before the first word."""
    return {**rules, **{key: _inside(rules.get(key)) for key in ("normalizer", "pre_tokenizer")}}


def _inside(rule: Any) -> Any:
    if not rule:
        return rule
    for key in ("normalizers", "pretokenizers"):
        if key in rule:
            return {
                **rule,
                key: [kept for part in rule[key] if (kept := _inside(part)) is not None],
            }
    if rule["type"] == "Prepend":
        return None
    if rule["type"] == "Metaspace":
        return {**rule, "prepend_scheme": "never"}
    return {**rule, "add_prefix_space": False} if rule["type"] == "ByteLevel" else rule
