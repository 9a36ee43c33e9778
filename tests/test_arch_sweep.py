"""The sweep over architectures tells what works from what is refused, and writes it down."""

import pytest
from rc_agents.benchmarks.arch_sweep import CHECKS, Row, attempt, main, page

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.filterwarnings("ignore"),  # of other people's architectures
]


@pytest.mark.parametrize("kind", ["llama", "falcon_mamba", "gemma3", "deepseek_v3"])
def test_a_type_that_works(kind):
    assert attempt(kind) == Row(kind, checks=dict.fromkeys(CHECKS, True))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cpmant", "'cpmant' is not supported: its block 1 gives states of shape (1, 35, 32)"),
        ("rwkv", "'rwkv' is not supported: its forward takes no cache"),
        ("minimax", "three tokens through it raise ValueError: MiniMax uses cache of its own"),
        ("hrm_text", "expected exactly one list of 32 blocks, found model.L_module.layers[4]"),
    ],
)
def test_a_type_that_is_refused_by_name_and_reason(kind, reason):
    row = attempt(kind)
    assert row.state == "refused"
    assert reason in row.reason


def test_a_type_that_cannot_be_built_is_said_to_be_untried():
    row = attempt("musicgen")
    assert row.state == "untried"
    assert row.reason.startswith("no tiny model: AttributeError")


def test_the_page_holds_every_type():
    rows = [Row("llama"), Row("xlm", "refused", "it | that"), Row("moshi", "fails", "no")]
    text = page(rows, "2026-01-01")
    assert "1 works, 1 refused, 1 fails, 0 untried" in text
    assert "| `xlm` | it / that |" in text


def test_some_types_can_be_named(capsys):
    main(["gpt2", "xlnet"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last == '{"refused": 1, "works": 1}'
