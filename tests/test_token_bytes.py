"""Tokens as bytes, tokenization by segments, the anchor's text as a clock, and rows that follow it."""

import copy
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rc_agents import packaged
from rc_agents.alignment import (
    AS_BEFORE,
    NOTHING,
    Branch,
    Clock,
    Row,
    Segments,
    TokenBytes,
    same_tokenizer,
)
from rc_agents.alignment.segments import Segment
from rc_agents.alignment.tokens import readable
from rc_agents.errors import TokenError
from tests.spans import CODE, OTHER, PROSE, TEXTS
from tests.tiny_tokenizers import BOS, EOS, KINDS, PAD, tiny_tokenizer

SAMPLES = [PROSE, CODE, OTHER, "", "a", " ", "\n", " leading", "🙂", "</s>", "12345 6"]


def _with_normalizer(normalizer: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer("prose"))
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def _with_metaspace() -> PreTrainedTokenizerFast:
    """The same pieces as "metaspace", made by a pre-tokenizer instead of a normaliser (newer Llama files)."""
    tokenizer = copy.deepcopy(tiny_tokenizer("metaspace"))
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _without_a_byte() -> PreTrainedTokenizerFast:
    """A tokenizer that has no token for the byte of "?" and drops it, as SmolLM2 does with some."""
    tokenizer = copy.deepcopy(tiny_tokenizer("code"))
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["model"]["vocab"]["?"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))


TOKENIZERS = {
    **{kind: lambda kind=kind: tiny_tokenizer(kind) for kind in KINDS},
    "metaspace pre-tokenizer": _with_metaspace,
    "nfc": lambda: _with_normalizer(normalizers.NFC()),
    "without a byte": _without_a_byte,
    "lowercase": lambda: _with_normalizer(normalizers.Lowercase()),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def segments(request) -> Segments:
    return Segments(TokenBytes(TOKENIZERS[request.param]()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SAMPLES)
def test_the_bytes_of_a_text_s_tokens_are_the_text(kind, text):
    tokenizer = tiny_tokenizer(kind)
    tokens = TokenBytes(tokenizer)
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert b"".join(tokens.of(ids)) == text.encode()
    assert [index for index, _ in tokens.split([text.encode()], first=True)[0]] == ids[
        len(tokens.lead) :
    ]


def test_an_emoji_is_split_over_tokens_byte_by_byte():
    pieces = TokenBytes(tiny_tokenizer("prose")).split(["a🙂".encode()], first=True)[0]
    assert [end for _, end in pieces] == [1, 2, 3, 4, 5]


def test_a_space_belongs_to_the_word_behind_it_and_digits_stand_alone():
    prose, code = (TokenBytes(tiny_tokenizer(kind)) for kind in ("prose", "code"))
    assert prose.of(prose.tokenizer("of the")["input_ids"])[-1] == b" the"
    assert code.of(code.tokenizer("123")["input_ids"]) == [b"", b"1", b"2", b"3"]


def test_the_space_that_a_tokenizer_puts_before_a_text_is_no_text():
    tokens = TokenBytes(tiny_tokenizer("metaspace"))
    first, later = (tokens.split([b"the"], first=first)[0] for first in (True, False))
    assert first[-1][1] == later[-1][1] == 3
    assert tokens.pieces[first[0][0]].startswith(b" ")
    assert not tokens.pieces[later[0][0]].startswith(b" ")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_no_text_and_text_that_spells_one_is_text(kind):
    tokens = TokenBytes(tiny_tokenizer(kind))
    assert tokens.of([PAD, BOS, EOS]) == [b"", b"", b""]
    spelled = [index for index, _ in tokens.split([b"</s>"], first=True)[0]]
    assert EOS not in spelled
    assert b"".join(tokens.of(spelled)) == b"</s>"
    assert tokens.lead == ([] if kind == "prose" else [BOS])


def test_an_added_token_that_is_not_special_is_its_text():
    tokenizer = copy.deepcopy(tiny_tokenizer("prose"))
    tokenizer.add_tokens([AddedToken("<tag>", special=False)])
    tokens = TokenBytes(tokenizer)
    (index, end), _ = tokens.split([b"<tag>x"], first=True)[0]
    assert (index, end, tokens.pieces[index]) == (len(tokenizer) - 1, 5, b"<tag>")


def test_where_a_normaliser_changes_the_text_ends_come_from_offsets():
    tokens = TokenBytes(_with_normalizer(normalizers.NFC()))
    pieces = tokens.split(["e\u0301x".encode()], first=True)[0]
    assert pieces[-1][1] == len("e\u0301x".encode())
    assert len(tokens.split([b"E"], first=True)[0]) == 1


def test_the_users_tokenizer_is_left_as_it_was():
    tokenizer = copy.deepcopy(tiny_tokenizer("code"))
    before = tokenizer(["a", "the people"], padding=True, truncation=True, max_length=3)
    state = tokenizer.backend_tokenizer.to_str()
    Segments(TokenBytes(tokenizer)).tokenize(PROSE.encode())
    assert tokenizer.backend_tokenizer.to_str() == state
    assert tokenizer(["a", "the people"], padding=True, truncation=True, max_length=3) == before


def test_a_tokenizer_without_a_backend_is_refused_by_name():
    slow = SimpleNamespace(get_vocab=lambda: {})
    with pytest.raises(TokenError, match=r"'medical' \(SimpleNamespace\) is no fast tokenizer"):
        TokenBytes(slow, "medical")


@pytest.mark.parametrize(("decoder", "kind"), [(decoders.WordPiece(), "WordPiece"), (None, "none")])
def test_a_tokenizer_of_an_unknown_kind_is_refused_by_name(decoder, kind):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(TokenError, match=f"'medical' has a decoder of type '{kind}'"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend), "medical")


def test_same_tokenizer_compares_rules_not_objects():
    prose = tiny_tokenizer("prose")
    assert same_tokenizer(prose, copy.deepcopy(prose))
    assert not same_tokenizer(prose, tiny_tokenizer("code"))
    assert not same_tokenizer(prose, None)


def test_an_unfinished_character_waits_and_a_broken_byte_is_a_question_mark():
    smile = "🙂".encode()
    assert [readable(smile[:end]) for end in range(5)] == ["", "", "", "", "🙂"]
    assert readable(smile[:2] + b"a") == "??a"
    assert readable(b"\xff") == "?"


# --- segments ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_segments_give_the_tokens_of_the_whole_text(segments, text):
    whole = segments.tokens.split([text.encode()], first=True)[0]
    found = segments.tokenize(text.encode())
    assert [index for index, _ in found] == [index for index, _ in whole]
    assert [end for _, end in found][-1:] == [end for _, end in whole][-1:]


def test_segments_are_short_and_remembered():
    segments = Segments(TokenBytes(tiny_tokenizer("prose")))
    starts = segments.starts(PROSE.encode())
    assert segments.cuts_at == "pairs"
    assert max(b - a for a, b in itertools.pairwise([*starts, len(PROSE)])) < 12
    assert (
        segments.of([Segment(b" people", False)])[0] is segments.of([Segment(b" people", False)])[0]
    )


def test_cuts_that_do_not_hold_are_not_used():
    class Joins(TokenBytes):
        """A tokenizer whose tokens depend on the whole text."""

        def split(self, parts, *, first):
            return [((len(part), len(part)),) for part in parts]

    segments = Segments(Joins(tiny_tokenizer("prose")))
    assert segments.cuts_at == "nowhere"
    assert segments.tokenize(b"of the town") == [(11, 11)]


# --- the clock and the rows -------------------------------------------------------------------------------------


def test_the_clock_waits_in_a_character_and_skips_what_is_no_text():
    tokens = TokenBytes(tiny_tokenizer("code"))
    emoji = [index for index, _ in tokens.split(["🙂".encode()], first=True)[0]]
    clock = Clock()
    clock.extend(tokens, [PAD, BOS, *emoji, EOS], [0, 1, 1, 1, 1, 1, 1])
    assert clock.sizes == [0, 0, 0, 0, 0, 4, 4]
    assert [clock.column_at(end) for end in range(5)] == [-1, 2, 3, 4, 5]
    clock.cut(4)
    assert (clock.sizes, bytes(clock.text), clock.column_at(4)) == ([0, 0, 0, 0], b"", 3)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, data=st.data())
def test_a_clock_is_the_same_however_it_was_wound(text, data):
    tokens = TokenBytes(tiny_tokenizer("metaspace"))
    ids = tokens.tokenizer(text)["input_ids"]
    once, often = Clock(), Clock()
    once.extend(tokens, ids, [1] * len(ids))
    for start in range(0, len(ids), 3):
        often.extend(tokens, [*ids[start : start + 3], 7], [1] * len(ids[start : start + 3]) + [1])
        often.cut(min(start + 3, len(ids)))
        often = often.copy()
    assert often == once
    assert (
        bytes(once.text) == b"".join(tokens.of(ids)).decode("utf-8", "replace").encode()
        or "\ufffd" in text
    )


def _behind(row: Row, speaker: int, branch: Branch) -> list[int]:
    """The tokens behind a speaker, its own last."""
    if speaker < len(row.pieces):
        return [index for index, _ in row.pieces[: speaker + 1]]
    at, tail = speaker - len(row.pieces), []
    root = branch.roots[at]
    while at >= 0:
        tail.append(branch.pieces[at][0])
        at = branch.parents[at]
    return [index for index, _ in row.pieces[:root]] + tail[::-1]


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, anchor=st.sampled_from(list(KINDS)), data=st.data())
def test_at_every_column_the_last_token_of_the_text_up_to_there_speaks(
    segments, text, anchor, data
):
    def alone(size: int) -> list[int]:
        pieces = segments.tokens.split([bytes(clock.text[:size])], first=True)[0] if size else ()
        return [*segments.tokens.lead, *(index for index, _ in pieces)] if pieces else []

    spelling = TokenBytes(tiny_tokenizer(anchor))
    ids = spelling.tokenizer(text)["input_ids"]
    clock, row = Clock(), Row(segments)
    behind: list[int] = []
    for _ in range(6):
        since = clock.num_columns
        if since == len(ids):
            break
        step = data.draw(st.integers(1, len(ids) - since))
        clock.extend(spelling, ids[since : since + step], [1] * step)
        branch, speakers = row.follow(clock, since, tree=True)
        row.slots += range(len(row.slots), len(row.pieces))
        for size, speaker in zip(clock.sizes[since:], speakers, strict=True):
            if speaker != AS_BEFORE:
                behind = [] if speaker == NOTHING else _behind(row, speaker, branch)
            assert behind == alone(size)
        if data.draw(st.booleans()):
            keep = data.draw(st.integers(0, clock.num_columns))
            clock.cut(keep)
            row.cut(keep, len(clock.text))
            behind = alone(len(clock.text))


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, anchor=st.sampled_from(list(KINDS)))
def test_a_line_of_tokens_is_only_ever_appended_to(segments, text, anchor):
    spelling = TokenBytes(tiny_tokenizer(anchor))
    ids = spelling.tokenizer(text)["input_ids"]
    whole, steps = Row(segments), Row(segments)
    clock = Clock()
    clock.extend(spelling, ids, [1] * len(ids))
    if ids:
        at_once = whole.follow(clock, 0, tree=False)[1]
        step_by_step, growing = [], Clock()
        for column, index in enumerate(ids):
            growing.extend(spelling, [index], [1])
            before = list(steps.pieces)
            step_by_step += steps.follow(growing, column, tree=False)[1]
            assert steps.pieces[: len(before)] == before
        assert whole.pieces == steps.pieces
        assert [max(who, -1) for who in at_once] == list(
            itertools.accumulate(step_by_step, lambda last, who: last if who == AS_BEFORE else who)
        )
    ends = [end for _, end in whole.pieces]
    assert ends == sorted(ends)
    assert max(ends, default=0) <= len(clock.text)


# --- real tokenizers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Segments:
    folder = packaged.resolve("package:smollm2-135m", progress=False)
    return Segments(TokenBytes(AutoTokenizer.from_pretrained(folder)))


@pytest.mark.real
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_smollm2_tokenizes_by_segments(smollm2, text):
    assert smollm2.cuts_at == "pairs"
    found = smollm2.tokenize(text.encode())
    assert found == list(smollm2.tokens.split([text.encode()], first=True)[0])


@pytest.mark.real
def test_smollm2_tokenizes_a_python_module_by_segments(smollm2):
    text = Path(copy.__file__).read_bytes()
    assert smollm2.tokenize(text) == list(smollm2.tokens.split([text], first=True)[0])
