"""What an answer must look like: grammars that leave only the tokens possible that keep to them (llguidance)."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is spaced; a weak model would fill free white space for ever."""
KEPT = 128
"""Grammars that stay compiled, those used last."""


@dataclass(frozen=True)
class Guide:
    """A grammar that a whole answer keeps to; the answer ends where the grammar does.

    Args:
        grammar: in llguidance's form; `json_schema`, `json_object`, `choice`, `regex` and `lark` make it.

    Raises:
        InputError: llguidance does not understand it.
        ImportError: llguidance is not installed.
    """

    grammar: str

    def __post_init__(self) -> None:
        if reason := _wrong(self.grammar):
            raise InputError(f"no answer can be guided by this grammar or schema: {reason:.300}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Guide:
        """JSON of a schema."""
        if not isinstance(schema, Mapping):
            raise InputError(f"a JSON schema is a dict, got {type(schema).__name__}")
        try:
            grammar = _compiled(json.dumps(schema))
        except (ValueError, RecursionError) as error:
            raise InputError(f"no answer can be guided by this schema: {error!s:.200}") from error
        return cls(grammar)

    @classmethod
    def json_object(cls) -> Guide:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choice(cls, options: Sequence[str]) -> Guide:
        """One of some texts."""
        if isinstance(options, str) or not options or not all(options):
            raise InputError(f"a choice is a list of texts, none of them empty, got {options!r}")
        return cls.lark("start: " + " | ".join(map(quoted, options)))

    @classmethod
    def regex(cls, pattern: str) -> Guide:
        """A regular expression, in Rust's form, that the whole answer matches."""
        return cls(_llguidance().LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def lark(cls, grammar: str) -> Guide:
        """A context-free grammar in llguidance's variant of Lark."""
        return cls(_llguidance().LLMatcher.grammar_from_lark(grammar))


def quoted(text: str) -> str:
    """Returns a text as a terminal of a Lark grammar."""
    return json.dumps(text)


class Guiding:
    """One row on its way through a grammar.

    Args:
        vocabulary: of the anchor.
        guide: what the row keeps to.

    Raises:
        InputError: the guide cannot be followed with these tokens.
    """

    def __init__(self, vocabulary: Vocabulary, guide: Guide) -> None:
        self._matcher = vocabulary.matcher(guide)
        self._check()

    @property
    def ended(self) -> bool:
        """Whether nothing can follow but the end of the text."""
        return self._matcher.is_stopped()

    def push(self, token: int) -> None:
        """Takes the row's next token."""
        if not self.ended:
            self._matcher.consume_token(token)
            self._check()

    def allowed(self, size: int) -> Tensor:
        """Returns which of `size` tokens may come next, bool (V,)."""
        known = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        found = torch.zeros(size, dtype=torch.bool)
        found[: len(known)] = known[:size] > 0
        return found

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().split("<state>")[0].strip()
            raise InputError(f"the guide cannot be followed: {reason:.200}")


class Guided(LogitsProcessor):
    """Leaves a row only the tokens that its guide allows."""

    def __init__(self, guiding: Guiding) -> None:
        self.guiding = guiding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(1, T) tokens so far and (1, V) scores -> scores with -inf where a token breaks the grammar."""
        if self.guiding.ended:
            return scores
        allowed = self.guiding.allowed(scores.shape[-1]).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)


class Vocabulary:
    """A tokenizer as llguidance reads it, with the grammars compiled for it; takes about a second to make, so keep it.

    Args:
        tokenizer: a fast one of Hugging Face.
        size: of the model's vocabulary.
        eos: ids that end a text.

    Raises:
        InputError: the tokenizer is no fast one.
    """

    def __init__(self, tokenizer: Any, size: int, eos: Sequence[int]) -> None:
        compiled = functools.partial(
            _llguidance().LLMatcher, _read(tokenizer, size, eos), log_level=0
        )
        self._compiled = functools.lru_cache(KEPT)(compiled)
        self._lock = threading.Lock()

    def matcher(self, guide: Guide) -> LLMatcher:
        """Returns a guide's grammar at its beginning, for one row."""
        with self._lock:
            return self._compiled(guide.grammar).deep_copy()


def _read(tokenizer: Any, size: int, eos: Sequence[int]) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    try:
        known = max(size, len(tokenizer))
        return from_tokenizer(tokenizer, n_vocab=known, eos_token=list(eos) or None)
    except (ValueError, TypeError) as error:
        raise InputError(f"the anchor's tokenizer cannot be guided: {error}") from error


@functools.lru_cache(KEPT)
def _compiled(schema: str) -> str:
    """The grammar of a schema that is written as JSON."""
    return str(_llguidance().LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT))


@functools.lru_cache(KEPT)
def _wrong(grammar: str) -> str:
    """Why llguidance does not understand a grammar; nothing where it does."""
    wrong, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(grammar)
    return " ".join(" ".join(messages).split()) or "unknown" if wrong else ""


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "answers of a given form (tools, JSON, choices) need llguidance; run: pip install 'rc-agents[structured]'"
        ) from None
    return llguidance
