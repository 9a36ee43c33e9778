"""No later byte reaches a position: whatever comes behind, what lies before keeps every value.

The input is the anchor's tokens. A position keeps its value when its own tokens up to it stay, and the anchor's tokens
that end at or before its byte stay. (Why not less than that: docs/alignment.md.)
"""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rc_agents import CoupledForCausalLM, CoupledOutput
from rc_agents.alignment import Clock
from rc_agents.execution import span
from tests.spans import CODE, PROSE, TEXTS, close, ids_of, span_ensemble

pytestmark = pytest.mark.tiny

ENSEMBLES = {
    "pair": (("llama", "prose"), ("gpt2", "code")),
    "pair turned": (("gpt2", "code"), ("llama", "prose")),
    "sentencepiece": (("qwen2", "prose"), ("gemma3_text", "metaspace")),
    "sentencepiece anchor": (("gemma2", "metaspace"), ("opt", "prose")),
    "recurrent": (("llama", "metaspace"), ("mamba2", "code")),
    "triple": (("llama", "code"), ("gpt2", "prose"), ("gemma3_text", "metaspace")),
    "mixed triple": (("llama", "prose"), ("bloom", "code"), ("qwen3", "metaspace")),
}
SPECIALISTS = ("medical", "law")


@pytest.fixture(scope="module", params=ENSEMBLES)
def model(request) -> CoupledForCausalLM:
    return span_ensemble(*ENSEMBLES[request.param])


def clock_of(model: CoupledForCausalLM, ids: torch.Tensor) -> Clock:
    clock = Clock()
    clock.extend(model.anchor_bytes(), ids[0].tolist(), [1] * ids.shape[1])
    return clock


def run(model: CoupledForCausalLM, text: str) -> tuple[torch.Tensor, CoupledOutput] | None:
    ids = ids_of(model, text)
    return (ids, model(ids, output_steered=True, use_cache=True)) if ids.shape[1] else None


def common(one: list, other: list) -> int:
    return sum(
        1
        for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    )


@settings(max_examples=12, deadline=None)
@given(before=TEXTS, after=TEXTS, instead=TEXTS)
@example(before="hell", after="o wor", instead=" yes")
@example(before="the peo", after="ple", instead="  \n")
@example(before="", after="🙂", instead="a")
@example(before=CODE[:40], after=CODE[40:80], instead=PROSE[:20])
def test_what_comes_later_changes_nothing(model, before, after, instead):
    one, other = run(model, before + after), run(model, before + instead)
    if one is None or other is None:
        return
    (ids, output), (ids_2, output_2) = one, other
    clocks = [clock_of(model, each) for each in (ids, ids_2)]
    kept = common(ids[0].tolist(), ids_2[0].tolist())
    close(output.logits[:, :kept], output_2.logits[:, :kept])
    for name in set(SPECIALISTS) & set(output.steered_logits) & set(output_2.steered_logits):
        rows = [each.past_key_values.texts[name].rows[0].pieces for each in (output, output_2)]
        own = common(*rows)
        assert output.steered_input_ids[name][0, :own].tolist() == [
            index for index, _ in rows[0][:own]
        ]
        columns = [[clock.column_at(end) for _, end in rows[0][:own]] for clock in clocks]
        settled = common(*columns)
        settled = min(settled, sum(column < kept for column in columns[0]))
        one_logits, other_logits = (
            each.steered_logits[name][:, :settled] for each in (output, output_2)
        )
        close(one_logits, other_logits)


@settings(max_examples=12, deadline=None)
@given(text=TEXTS, data=st.data())
def test_what_was_said_is_the_same_whenever_more_is_said(model, text, data):
    ids = ids_of(model, text)
    if not ids.shape[1]:
        return
    end = data.draw(st.integers(1, ids.shape[1]))
    whole, part = (model(each, output_steered=True) for each in (ids, ids[:, :end]))
    close(whole.logits[:, :end], part.logits)


@settings(max_examples=15, deadline=None)
@given(text=TEXTS)
@example(text=CODE)
@example(text="a")
def test_every_source_token_lies_at_or_before_one_that_is_read(model, text):
    ids = ids_of(model, text)
    clock = clock_of(model, ids)
    if not clock.sizes or not clock.sizes[-1]:
        return
    cache = model(ids, use_cache=True).past_key_values
    readers = {name: model.reader(name) for name in cache.texts}
    fresh = type(cache)({})
    plan = span.plan(fresh, readers, model.anchor_bytes(), ids, torch.ones_like(ids))
    whole = clock.sizes[-1] == clock._raw_sizes[-1]  # the text ends with a whole character
    last_column = max(
        column for column in (clock.column_at(end) for end in range(len(clock._raw) + 1))
    )
    for name, step in plan.steps.items():
        # The last of the model's tokens speaks at the anchor's last column (and so to every other specialist there).
        assert int(plan.picks[name][0, -1]) == int(step.real.sum()) - 1
        if whole:
            assert int(plan.reads[name].max()) == last_column
