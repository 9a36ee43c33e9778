"""Where training data comes from, how it is put into words, split without leaks and batched without waste."""

import random
import sys

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rc_agents import packaged
from rc_agents.errors import DataError, PackageError
from rc_agents.training import data
from rc_agents.training.data import Conversation, Document, Encoded, Message, Pair, Source, Template
from rc_agents.training.data.shingles import normalise, shingles
from rc_agents.training.data.sources import parse
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

ROWS = [{"instruction": f"Say {n}.", "output": f"It is {n}.", "id": n} for n in range(40)]
COLUMNS = {"prompt": "instruction", "completion": "output"}
PAIRS = [Pair(row["instruction"], row["output"]) for row in ROWS]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who came?"},
    {"role": "assistant", "content": "The doctor."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "In the morning."},
]
MESSAGES = tuple(Message(**message) for message in CHAT)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Keeps what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def table():
    return datasets.Dataset.from_list(ROWS)


# --- Hugging Face datasets ---


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "form", ["saved", "saved with splits", "parquet", "csv", "json", "jsonl", "folder"]
)
def test_reads_local_datasets(tmp_path, table, form, streaming):
    path = tmp_path / f"rows.{form}"
    if form == "saved":
        table.save_to_disk(path)
    elif form == "saved with splits":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    elif form == "folder":
        path.mkdir()
        table.to_parquet(path / "train-00000.parquet")
        (path / "README.md").write_text("Not a document to learn.")
    else:
        getattr(table, f"to_{form.removesuffix('l')}")(path)
    limit = 99 if form == "csv" else 30  # a CSV stream left before its end stays open in `datasets`
    source = Source(dataset=path, columns=COLUMNS, streaming=streaming, limit=limit)
    assert data.read(source) == PAIRS[:limit]


def test_tables_and_dataset_folders_need_no_source(tmp_path, table):
    renamed = table.rename_columns({"instruction": "question", "output": "answer"})
    renamed.to_csv(tmp_path / "rows.csv")
    renamed.save_to_disk(tmp_path / "saved")
    assert data.read(tmp_path / "rows.csv") == data.read(str(tmp_path / "saved")) == PAIRS


def test_a_hub_id_goes_to_the_loader_as_it_is(table, monkeypatch):
    asked = {}

    def load_dataset(**options):
        asked.update(options)
        return table.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = (
        "hf:owner/name?config=en&split=test&revision=v1&streaming=true&limit=3&columns.text=output"
    )
    assert data.read(text) == [Document(f"It is {n}.") for n in range(3)]
    assert asked == {
        "path": "owner/name",
        "name": "en",
        "split": "test",
        "revision": "v1",
        "streaming": True,
    }


def test_the_text_of_a_source_says_all_of_it():
    assert parse(
        "hf:a/b?limit=5&shuffle=true&buffer_size=7&seed=3&columns.prompt=the%20question"
    ) == Source(
        dataset="a/b",
        limit=5,
        shuffle=True,
        buffer_size=7,
        seed=3,
        columns={"prompt": "the question"},
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_an_order_is_the_seeds(tmp_path, table, streaming):
    table.save_to_disk(tmp_path / "saved")

    def order(seed):
        source = Source(
            dataset=tmp_path / "saved",
            columns=COLUMNS,
            streaming=streaming,
            limit=10,
            shuffle=True,
            buffer_size=16,
            seed=seed,
        )
        return data.read(source)

    assert order(1) == order(1) != order(2)
    assert len(set(order(1))) == 10
    assert set(order(1)) <= set(PAIRS)


def test_a_stream_reads_no_further_than_its_limit():
    def rows():
        yield from ROWS[:5]
        raise AssertionError("read too far")

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda **_: stream)
        source = Source(dataset="owner/name", columns=COLUMNS, streaming=True, limit=5)
        assert data.read(source) == PAIRS[:5]


def test_blank_rows_of_a_dataset_are_counted(tmp_path):
    rows = [{"text": text} for text in ("", "one", " \n", "two")]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    with pytest.warns(UserWarning, match="2 blank rows are left out"):
        records = data.read(tmp_path / "saved")
    assert records == [Document("one"), Document("two")]


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PackageError, match=r"run  pip install 'rc-agents\[data\]'$"):
        data.read("hf:owner/name")


# --- templates ---


def test_templates_put_a_row_into_words():
    templates = [
        Template(prompt="Question: {question}\nAnswer:", completion=" {answer}", group="plain"),
        Template(prompt="{{{question}}} is {answer}."),
        Template(prompt="{question}", completion="{answer}", chat=True),
    ]
    row = {"question": "2 + 2?", "answer": 4, "text": "unused"}
    assert data.read([row], templates=templates) == [
        Pair("Question: 2 + 2?\nAnswer:", " 4", "plain", "2 + 2?"),
        Document("{2 + 2?} is 4.", "2 + 2?"),
        Conversation((Message("user", "2 + 2?"), Message("assistant", "4")), origin="2 + 2?"),
    ]


def test_all_that_is_made_of_a_row_stays_on_one_side():
    templates = [
        Template(prompt="What is the title of ICD-10-CM code {code}?", completion=" {title}"),
        Template(prompt="ICD-10-CM code {code} is", completion=" {title}.", group="statement"),
    ]
    rows = [{"code": f"A{n:02}", "title": f"title {n}"} for n in range(100)]
    records = data.read(rows, templates=templates)
    for near_duplicates in (False, True):
        parts = data.split(records, test=0.3, near_duplicates=near_duplicates)
        assert len(parts.train) > 100
        assert len(parts.test) > 30
        data.check_disjoint(parts.train, parts.validation, parts.test)
        assert len({record.origin for record in parts.test}) == len(parts.test) / 2


# --- conversations ---


@pytest.mark.parametrize(
    ("kind", "before", "answer"),
    [
        ("prose", "<|im_start|>assistant\n", "In the morning.<|im_end|></s>"),
        ("code", "### assistant:\n", "In the morning.</s>"),
        ("metaspace", "[/INST]", "In the morning.</s>"),
    ],
)
def test_a_conversation_is_rendered_and_its_last_answer_learnt(kind, before, answer):
    tokenizer = tiny_tokenizer(kind)
    (example,) = data.encode(
        tokenizer, data.read([{"messages": CHAT}]), max_length=512, block_length=8
    )
    prompt, learnt = example.ids[: example.answer_start], example.ids[example.answer_start :]
    rendered = tokenizer.apply_chat_template(CHAT[:4], add_generation_prompt=True)["input_ids"]
    assert list(prompt) == rendered
    assert tokenizer.decode(prompt).endswith(before)
    assert tokenizer.decode(learnt).lstrip() == answer
    assert example.group == "chat"


def test_every_turn_is_an_example_as_it_is_generated():
    tokenizer = tiny_tokenizer("prose")
    examples = data.encode(
        tokenizer, [Conversation(MESSAGES)], max_length=512, block_length=8, every_turn=True
    )
    assert [tokenizer.decode(e.ids[e.answer_start :]) for e in examples] == [
        "The doctor.<|im_end|></s>",
        "In the morning.<|im_end|></s>",
    ]
    assert examples[1:] == data.encode(
        tokenizer, [Conversation(MESSAGES)], max_length=512, block_length=8
    )


def test_conversations_are_told_apart_by_what_the_user_says_first():
    assert Conversation(MESSAGES).key == "Who came?"
    assert Conversation(MESSAGES[:1]).key == "Be brief."


# --- near-duplicates and splits ---

words = st.text(st.sampled_from("abcdefgh"), min_size=1, max_size=5)
texts = st.lists(words, min_size=1, max_size=30).map(" ".join)


@st.composite
def families(draw):
    """Texts, some of them copies with words changed, dropped or added."""
    found = draw(st.lists(texts, min_size=1, max_size=8))
    for _ in range(draw(st.integers(0, 8))):
        copy = draw(st.sampled_from(found)).split()
        for _ in range(draw(st.integers(0, 3))):
            place = draw(st.integers(0, len(copy)))
            copy[place : place + draw(st.integers(0, 1))] = draw(st.lists(words, max_size=1))
        found.append(" ".join(copy) or "x")
    return found


def _sets(found):
    made = shingles([normalise(text) for text in found])
    return [set(part.tolist()) for part in torch.tensor(made.ranks).split(made.sizes.tolist())]


def _alike(one, other, threshold):
    return one == other or len(one & other) >= threshold * len(one | other) - 1e-9


@settings(max_examples=30)
@given(families(), families(), st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_no_pair_of_near_duplicates_is_missed(a, b, threshold):
    b += a[:2]
    sets = _sets(a + b)
    expected = {
        (i, j)
        for i in range(len(a))
        for j in range(len(b))
        if _alike(sets[i], sets[len(a) + j], threshold)
    }
    found = list(data.near_duplicates(a, b, threshold))
    assert len(found) == len(set(found))
    assert {(i, j) for i, j, _ in found} == expected
    for i, j, similarity in found:
        one, other = sets[i], sets[len(a) + j]
        assert similarity == pytest.approx(len(one & other) / len(one | other))


@given(
    families(), st.sampled_from([0.3, 0.7]), st.integers(0, 9), st.randoms(use_true_random=False)
)
def test_a_split_by_near_duplicates_is_disjoint_whatever_the_order(found, threshold, seed, rng):
    records = [Document(text) for text in found]
    options = {"validation": 0.3, "test": 0.3, "seed": seed, "threshold": threshold}
    parts = data.split(records, near_duplicates=True, **options)
    data.check_disjoint(parts.train, parts.validation, parts.test, threshold=threshold)
    assert len(parts.train) + len(parts.validation) + len(parts.test) == len(records)
    again = data.split(rng.sample(records, len(records)), near_duplicates=True, **options)
    assert set(again.test) == set(parts.test)
    for group in data.duplicate_groups(found, threshold):
        if len(group) == 1:
            alone = data.split([records[group[0]]], **options)
            assert (records[group[0]] in parts.test) == bool(alone.test)


def test_perturbed_copies_are_found_and_strangers_are_not():
    rng = random.Random(0)
    vocabulary = [f"{a}{b}{c}" for a in "bdfk" for b in "aeiou" for c in ("st", "r", "mble", "n")]
    originals = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(300)]
    copies = []
    for text in originals:
        changed = text.split()
        for _ in range(4):
            changed[rng.randrange(len(changed))] = rng.choice(vocabulary)
        copies.append(", ".join(changed).upper() + "!")
    found = {(i, j) for i, j, _ in data.near_duplicates(originals, copies)}
    assert found == {(n, n) for n in range(300)}
    assert data.duplicate_groups(originals + copies) == [[n, n + 300] for n in range(300)]


def test_case_space_and_punctuation_do_not_count_and_no_language_is_left_out():
    chinese = "河水在春天从山上流下来，镇上的人都到岸边去看。医生说病人发烧，应该多喝水。"
    same = [
        ("The river, in spring.", "the RIVER\n in Spring"),
        (chinese, chinese[:30] + "也" + chinese[31:]),
        ("!!!", " !!!\n"),
    ]
    for one, other in same:
        assert [(i, j) for i, j, _ in data.near_duplicates([one], [other])] == [(0, 0)]
    assert not list(data.near_duplicates(["!!!", "", "a b"], ["???", "b a", " "][:2]))


def test_questions_of_one_template_are_not_taken_for_one():
    questions = [f"What is the title of ICD-10-CM code A{n:02}?" for n in range(100)]
    assert len(data.duplicate_groups(questions)) == 100


def test_a_group_too_large_to_split_is_reported():
    records = [Document(f"{PROSE} {n}") for n in range(12)]
    with pytest.warns(UserWarning, match="join 12 of 12 records"):
        parts = data.split(records, test=0.4, near_duplicates=True)
    assert 12 in {len(parts.train), len(parts.test), len(parts.validation)}


def test_near_duplicates_of_thousands_of_texts_take_no_time():
    rng = random.Random(0)
    vocabulary = [f"{n:x}" for n in range(5000)]
    found = [" ".join(rng.choices(vocabulary, k=100)) for _ in range(3000)]
    found += [" ".join([*text.split()[:-4], *rng.choices(vocabulary, k=4)]) for text in found[:500]]
    assert len(data.duplicate_groups(found)) == 3000


@pytest.mark.real
@pytest.mark.parametrize(
    "kind", ["general", "medical", pytest.param("python", marks=pytest.mark.slow)]
)
def test_no_packaged_test_document_or_near_duplicate_is_in_training(kind):
    try:
        found = packaged.text(kind)
    except PackageError as error:
        pytest.skip(str(error))
    records = data.read(found)
    parts = data.split(records, test=0.1, near_duplicates=True)
    assert len(parts.test) == pytest.approx(0.1 * len(records), rel=0.3)
    data.check_disjoint(parts.train, parts.validation, parts.test)
    copy = parts.test[0].text.upper().replace(".", " ;", 2)
    with pytest.raises(DataError, match=rf"train\[{len(parts.train)}\] and others\[1\]\[0\]"):
        data.check_disjoint([*parts.train, Document(copy)], parts.validation, parts.test)


# --- lengths ---


def _pairs(lengths):
    return [Pair("The river came down", " the hill" * n) for n in lengths]


def test_long_pairs_are_dropped_or_truncated_with_a_count():
    tokenizer = tiny_tokenizer("code")
    short, long = data.encode(tokenizer, _pairs([1, 3]), max_length=512, block_length=8)
    limit = len(long.ids) - 4
    options = {"max_length": limit, "block_length": 8}
    with pytest.warns(UserWarning, match=f"1 of 2 pairs have more than max_length={limit} .*drop"):
        assert data.encode(tokenizer, _pairs([1, 3]), long="drop", **options) == [short]
    with pytest.warns(UserWarning, match="truncated"):
        kept, cut = data.encode(tokenizer, _pairs([1, 3]), long="truncate", **options)
    assert kept == short
    assert len(cut.ids) == limit
    assert cut.ids[0] == tokenizer.bos_token_id
    assert cut.ids[1:] == long.ids[5:]  # the prompt's first four tokens are gone, the answer whole
    assert cut.ids[cut.answer_start :] == long.ids[long.answer_start :]


@settings(max_examples=20)
@given(st.integers(2, 60), st.integers(1, 12), st.booleans())
def test_a_truncated_pair_keeps_something_to_learn(max_length, words, answer_only):
    tokenizer = tiny_tokenizer("code")
    with pytest.warns(UserWarning, match="truncated"):
        (example,) = data.encode(
            tokenizer,
            _pairs([60 + words]),
            max_length=max_length,
            block_length=8,
            answer_only=answer_only,
            long="truncate",
        )
    assert len(example.ids) == max_length
    assert 1 <= example.answer_start < max_length


def test_batches_by_length_pad_little_and_still_cover_each_epoch():
    rng = random.Random(0)
    examples = [Encoded(tuple(range(rng.randint(4, 200))), 1, "a") for _ in range(512)]
    options = {"batch_size": 8, "text_batch_size": 1, "steps": 128, "seed": 3}
    plain, sorted_by = (data.plan(examples, by_length=flag, **options) for flag in (False, True))

    def padding(steps):
        lengths = [[len(examples[index].ids) for index in step] for step in steps]
        return 1 - sum(map(sum, lengths)) / sum(8 * max(row) for row in lengths)

    assert padding(sorted_by) < 0.05 < 0.35 < padding(plain)
    assert sorted_by == data.plan(examples, by_length=True, **options)
    for epoch in (sorted_by[:64], sorted_by[64:]):
        assert sorted(index for step in epoch for index in step) == list(range(512))
    assert {tuple(sorted(step)) for step in sorted_by[:64]} != {
        tuple(sorted(step)) for step in sorted_by[64:]
    }
    first = [max(len(examples[index].ids) for index in step) for step in sorted_by[:64]]
    assert first != sorted(first)


def test_a_few_of_unequal_length_are_one_batch():
    examples = [Encoded(tuple(range(n)), 1, "a") for n in (9, 3, 5)]
    options = {"batch_size": 8, "text_batch_size": 1, "steps": 2, "seed": 0}
    steps = data.plan(examples, by_length=True, **options)
    assert [sorted(step) for step in steps] == [[0, 1, 2]] * 2


# --- what users do wrong, and the one line that tells them ---


def _saved(tmp_path, rows=ROWS):
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def _file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def _encode(item, tokenizer=None, **options):
    tokenizer = tokenizer or tiny_tokenizer("prose")
    return data.encode(
        tokenizer, data.read([item]), **{"max_length": 99, "block_length": 8} | options
    )


def _without_template(template=None):
    tokenizer = type(tiny_tokenizer("prose"))(
        tokenizer_object=tiny_tokenizer("prose").backend_tokenizer, eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


MISTAKES = {
    "a wrong column": (
        lambda tmp: data.read(Source(dataset=_saved(tmp), columns={"text": "ouput"})),
        "has no column 'ouput'; known: instruction, output, id; did you mean 'output'?",
    ),
    "columns that are no record": (
        lambda tmp: data.read(_saved(tmp)),
        r"row 1 of dataset .* needs a non-empty text, .* not keys \['id', 'instruction', 'output'\]",
    ),
    "an unknown split of a saved dataset": (
        lambda tmp: data.read(Source(dataset=_dict(tmp), split="tset")),
        "has no split 'tset'; known: train, test; did you mean 'test'?",
    ),
    "the only split under another name": (
        lambda tmp: data.read(Source(dataset=_saved(tmp), split="test")),
        "was saved as one split, so it has no 'test'",
    ),
    "an unknown split of a file": (
        lambda tmp: data.read(
            f"hf:{_file(tmp, 'a.csv', b'text' + bytes([10]) + b'x')}?split=validation"
        ),
        'cannot be read: Unknown split "validation"',
    ),
    "a column that the stream lacks": (
        lambda tmp: data.read(f"hf:{_saved(tmp)}?streaming=true&limit=1&columns.text=body"),
        "has no column 'body'",
    ),
    "an empty dataset": (
        lambda tmp: data.read(_saved(tmp, [{"text": ""}])),
        "no training data in",
    ),
    "a hub id that is not there": (
        lambda tmp: data.read("hf:owner/name"),
        "dataset owner/name cannot be read: .*owner/name",
    ),
    "a path that is not there": (
        lambda tmp: data.read(f"hf:{tmp}/absent"),
        "absent does not exist, and its name is no hub id",
    ),
    "a table that is not there": (
        lambda tmp: data.read("hf:absent.parquet"),
        "absent.parquet does not exist",
    ),
    "a damaged table": (
        lambda tmp: data.read(_file(tmp, "a.parquet", b"no table")),
        "a.parquet cannot be read: .*",
    ),
    "a table that is not UTF-8": (
        lambda tmp: data.read(_file(tmp, "a.csv", b"text\n\xff\xfe\n")),
        "a.csv cannot be read: .*codec can't decode",
    ),
    "no table": (
        lambda tmp: data.read(f"hf:{_file(tmp, 'a.txt', b'text')}"),
        "a.txt is no table: expected a file ending in .arrow, .csv",
    ),
    "a folder of CSV": (
        lambda tmp: data.read(_file(tmp, "a.csv", b"text\nx\n").parent),
        "if it holds tables, read it as hf:",
    ),
    "a stream without end": (
        lambda tmp: Source(dataset="owner/name", streaming=True),
        "streaming dataset owner/name needs limit=",
    ),
    "no limit at all": (lambda tmp: Source(dataset="a/b", limit=0), "a whole number above 0"),
    "an unknown option": (
        lambda tmp: data.read("hf:a/b?spilt=test"),
        "has no option 'spilt'; known: config, split, .*; did you mean 'split'?",
    ),
    "an option of the wrong type": (
        lambda tmp: data.read("hf:a/b?limit=ten"),
        "option 'limit' of 'hf:a/b.limit=ten' needs a whole number, not 'ten'",
    ),
    "no dataset": (lambda tmp: data.read("hf:?split=test"), "names no dataset"),
    "a JSON line that is no object": (
        lambda tmp: data.read(_file(tmp, "a.jsonl", b'{"text": "x"}\n[1]\n')),
        "a.jsonl:2 needs a non-empty text, .* not list",
    ),
    "a file that is not UTF-8": (
        lambda tmp: data.read(_file(tmp, "a.txt", b"caf\xe9")),
        "a.txt cannot be read as UTF-8 text",
    ),
    "a field that is not there": (
        lambda tmp: data.read(ROWS, templates=[Template(prompt="{instuction}")]),
        "record 1 has no field 'instuction'; known: .*; did you mean 'instruction'?",
    ),
    "an empty field": (
        lambda tmp: data.read([{"q": " "}], templates=[Template(prompt="{q}?")]),
        "field 'q' of record 1 needs text, not ' '",
    ),
    "a field that is no text": (
        lambda tmp: data.read([{"q": {"a": 1}}], templates=[Template(prompt="{q}?")]),
        "needs text, not {'a': 1}",
    ),
    "a text for a template": (
        lambda tmp: data.read(["x"], templates=[Template(prompt="{q}")]),
        "record 1 has no fields for a template: it is str",
    ),
    "a template without a field": (lambda tmp: Template(prompt="hello"), "names no field"),
    "a template with half a brace": (lambda tmp: Template(prompt="{q"), "for braces as such"),
    "a template that computes": (lambda tmp: Template(prompt="{q.x}"), "needs plain fields"),
    "a chat without an answer": (lambda tmp: Template(prompt="{q}", chat=True), "a completion"),
    "messages that are no list": (
        lambda tmp: data.read([{"messages": "hello"}]),
        "record 1 has messages that are no list but str",
    ),
    "a message without content": (
        lambda tmp: data.read([{"messages": [*CHAT[:2], {"role": "assistant", "content": None}]}]),
        "message 3 of record 1 needs a role and a content",
    ),
    "no answer to learn": (
        lambda tmp: data.read([{"messages": CHAT[:2]}]),
        "record 1 has no message of the role 'assistant'",
    ),
    "an answer to nothing": (
        lambda tmp: _encode({"messages": CHAT[2:3]}),
        "nothing stands before the answer 'The doctor.'",
    ),
    "no chat template": (
        lambda tmp: _encode({"messages": CHAT}, _without_template()),
        "it has none: set tokenizer.chat_template",
    ),
    "a chat template that refuses": (
        lambda tmp: _encode(
            {"messages": CHAT}, _without_template("{{ raise_exception('no system role') }}")
        ),
        "the chat template refuses messages: no system role",
    ),
    "a chat template that rewrites the prompt": (
        lambda tmp: _encode(
            {"messages": CHAT},
            _without_template(
                "{{ messages | length }}{% if add_generation_prompt %}<think>{% endif %}"
            ),
        ),
        "does not render an answer behind its own generation prompt",
    ),
    "a pair that is too long": (
        lambda tmp: _encode({"prompt": "p " * 99, "completion": "c"}),
        "1 of 1 pairs have more than max_length=99 tokens, the first .*long='drop' or 'truncate'",
    ),
    "nothing but pairs that are too long": (
        lambda tmp: _encode({"prompt": "p " * 99, "completion": "c"}, long="drop"),
        "1 of 1 pairs have more than max_length=99 tokens: raise",
    ),
    "an unknown way with long pairs": (
        lambda tmp: _encode({"prompt": "p", "completion": "c"}, long="cut"),
        "long='cut' is unknown; known: refuse, drop, truncate",
    ),
    "a threshold in percent": (
        lambda tmp: data.duplicate_groups(["a", "b"], 70),
        "above 0 and up to 1, not 70",
    ),
    "a test text in training": (
        lambda tmp: data.check_disjoint(["a b c", "d"], ["e"], ["A b, c!"]),
        r"train\[0\] and others\[1\]\[0\] are near-duplicates \(similarity 1.00\): 'a b c'",
    ),
}


def _dict(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(tmp_path, mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(DataError, match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)
