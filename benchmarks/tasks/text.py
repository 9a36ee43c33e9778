"""Text of a domain: loss of unseen documents in a sliding window, and of their second halves behind the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rc_agents.benchmarks.domains import Domain
from rc_agents.benchmarks.scores import Score

from rc_agents.scoring import Scorer


def text_scores(scorer: Scorer, documents: Sequence[str], domain: Domain) -> dict[str, Score]:
    """Returns `perplexity` and `bits_per_byte` of documents, and `continuation` perplexity of their second halves.

    Padding never counts. Perplexities are per token of the tokenizer that a method reads with; bits per byte compare
    methods whose tokens differ.
    """
    found = scorer.rolling_nll(documents, domain.window, domain.stride)
    nll = [one.nll for one in found]
    rest = scorer.loglikelihood(halves(documents))
    return {
        "perplexity": Score(
            values=nll,
            weights=[one.num_tokens for one in found],
            kind="perplexity",
            better="lower",
        ),
        "bits_per_byte": Score(
            values=nll, weights=[one.num_bytes for one in found], kind="bits", better="lower"
        ),
        "continuation": Score(
            values=[-one.logprob for one in rest],
            weights=[one.num_tokens for one in rest],
            kind="perplexity",
            better="lower",
        ),
    }


def halves(documents: Sequence[str]) -> list[tuple[str, str]]:
    """Returns each document's first and second half, cut where a word ends."""
    pairs = []
    for text in documents:
        middle = len(text) // 2
        cut = text.find(" ", middle)
        cut = middle if cut < 0 else cut
        pairs.append((text[:cut], text[cut:]))
    return pairs


def domain_loss(scorer: Scorer, domain: Domain) -> float:
    """Returns nats a token on validation documents and their second halves, which choose among learning rates."""
    scores = text_scores(scorer, domain.documents("validation"), domain)
    nats: Any = sum(sum(scores[name].values) for name in ("perplexity", "continuation"))
    tokens: Any = sum(sum(scores[name].weights or ()) for name in ("perplexity", "continuation"))
    return float(nats / tokens)
