"""The command line, in this process; in processes of its own where signals and pipes matter."""

import asyncio
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from transformers import AutoModelForCausalLM

import rc_agents
from rc_agents.cli import app as app_object
from rc_agents.cli import doctor as doctor_module
from rc_agents.cli.app import run
from rc_agents.cli.models import by_name, names, specialist
from rc_agents.errors import RCError
from rc_agents.nodes import Node, NodeSettings
from rc_agents.service import GenerationParams, GenerationService, load
from tests.tiny import saved

pytestmark = pytest.mark.tiny
COMMAND = [sys.executable, "-m", "rc_agents.cli"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model that never ends by itself."""
    path = saved(tmp_path_factory.mktemp("models"), "llama", "prose")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ensemble(base, tmp_path_factory):
    """A saved ensemble whose bridges speak."""
    other = saved(tmp_path_factory.mktemp("models"), "llama", "prose", seed=1, layers=6)
    model = rc_agents.couple(
        str(base), {"medical": str(other)}, bridge={"start": "default", "gate": "fixed"}, sites=2
    )
    path = tmp_path_factory.mktemp("ensemble")
    model.save_pretrained(path)
    return path


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs a command line; returns its exit code, stdout and stderr."""

    def call(*words, stdin=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if stdin is not None else _Terminal())
        code = run([str(word) for word in words])
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def answer(path, text, **chosen):
    params = GenerationParams(**{"max_new_tokens": 6, **chosen})
    return GenerationService(load(path)).generate(text, params)


# generate


def test_a_prompt_from_the_line_or_from_a_pipe(cli, ensemble):
    expected = answer(ensemble, "Hello").text + "\n"
    limit = ["--max-new-tokens", 6]
    assert cli("generate", ensemble, "Hello", *limit) == (0, expected, "")
    assert cli("generate", ensemble, *limit, stdin="Hello\n") == (0, expected, "")
    assert cli("generate", ensemble, "-", "--stream", *limit, stdin="Hello") == (0, expected, "")


def test_every_choice_reaches_the_service(cli, ensemble):
    choices = ["--temperature", "0.9", "--top-p", "0.9", "--top-k", "40", "--seed", "3"]
    choices += ["--strength", "medical=2", "--stop", "e", "--stop", "o", "--specialists", "medical"]
    code, out, _ = cli("generate", ensemble, "Hi", "--max-new-tokens", 6, "--json", *choices)
    expected = answer(
        ensemble,
        "Hi",
        temperature=0.9,
        top_p=0.9,
        top_k=40,
        seed=3,
        strength={"medical": 2.0},
        stop=["e", "o"],
        specialists=["medical"],
    )
    assert (code, json.loads(out)["text"]) == (0, expected.text)
    assert json.loads(out)["finish_reason"] == expected.finish_reason


def test_the_anchor_alone_and_a_chat(cli, ensemble):
    alone = answer(ensemble, "Hi", specialists=[]).text
    limit = ["--max-new-tokens", 6]
    assert cli("generate", ensemble, "Hi", "--specialists", "none", *limit)[1] == alone + "\n"
    assert cli("generate", ensemble, "Hi", "--strength", "0", *limit)[1] == alone + "\n"
    chat = answer(ensemble, [{"role": "user", "content": "Hi"}]).text
    assert cli("generate", ensemble, "Hi", "--chat", *limit)[1] == chat + "\n"


def test_models_that_are_put_together_in_the_line(cli, base):
    words = ["--anchor", base, "--specialist", f"medical={base}", "--max-new-tokens", 6]
    code, out, err = cli("generate", "Hi", *words)
    assert (code, out) == (0, answer(base, "Hi").text + "\n")
    assert err == "note: new bridges are untrained, so the anchor answers as it would alone\n"
    dtypes = ["--dtype", "anchor=bfloat16,medical=float32", "--device-map", "cpu"]
    code, out, _ = cli("info", *words[:4], *dtypes, "--json")
    assert [one["dtype"] for one in json.loads(out)["models"]] == ["bfloat16", "float32"]


# info


def test_info_shows_what_the_ensemble_is(cli, ensemble):
    model = load(ensemble)
    code, out, err = cli("info", ensemble, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [one["name"] for one in found["models"]] == ["anchor", "medical"]
    assert found["sites"] == [
        dict(zip(["anchor", "medical"], row, strict=True)) for row in model.sites
    ]
    assert {(one["source"], one["target"]) for one in found["edges"]} == set(model.edges)
    assert all(one["gates"] == [1.0, 1.0] for one in found["edges"])
    assert found["parameters"] == sum(one.numel() for one in model.parameters())
    assert found["memory_bytes"] >= 4 * found["parameters"]
    trained = sum(one.numel() for _, one in model.trainable_parameters())
    assert found["trainable_parameters"] == trained
    code, out, _ = cli("info", ensemble)
    assert code == 0
    for part in ("medical", "llama", "anchor -> medical", "1.000", f"{trained:,}"):
        assert part in out


def test_info_counts_shared_weights_once(cli, base, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path)
    words = ["--anchor", base, "--specialist", f"medical={base}+{tmp_path}"]
    found = json.loads(cli("info", *words, "--json")[1])
    single = json.loads(cli("info", base, "--json")[1])
    extra = found["parameters"] - single["parameters"] - found["trainable_parameters"]
    assert 0 < extra < 5000
    assert found["models"][1]["from"] == {"base": str(base), "adapter": str(tmp_path)}


# chat


def test_a_chat_through_a_pipe(cli, ensemble):
    lines = ["Hello", "", "/specialists none", "And?", "/reset", "Hello", "/strength 2", "Hello"]
    lines += ["/quit", "never read"]
    limit = ["--max-new-tokens", 6]
    code, out, err = cli("chat", ensemble, *limit, stdin="\n".join(lines))
    first = {"role": "user", "content": "Hello"}
    one = answer(ensemble, [first]).text
    talk = [first, {"role": "assistant", "content": one}, {"role": "user", "content": "And?"}]
    two = answer(ensemble, talk, specialists=[]).text
    three = answer(ensemble, [first], specialists=[]).text
    talk = [first, {"role": "assistant", "content": three}, first]
    four = answer(ensemble, talk, specialists=[], strength=2).text
    assert (code, out) == (0, f"{one}\n{two}\n{three}\n{four}\n")
    assert err == "specialists: none\na new chat\nstrength: 2\n"


def test_a_chat_answers_in_lines_of_json(cli, ensemble):
    lines = ["Hello", "/strength high", "/compare", "And?"]
    words = ["chat", ensemble, "--max-new-tokens", 6]
    code, out, err = cli(*words, "--json", stdin="\n".join(lines))
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert err.startswith("error: expected a number, got 'high'")
    assert [one.pop("who", None) for one in found] == [None, "frozen anchor", "ensemble", None]
    plain = cli(*words, stdin="Hello\nAnd?")[1]
    assert f"{found[0]['text']}\n{found[3]['text']}\n" == plain
    assert found[2] == found[0]
    assert found[0]["completion_tokens"] == 6


def test_a_chat_goes_on_after_a_mistake(cli, ensemble):
    lines = ["/specialits x", "/specialists legal", "/strength high", "word " * 300, "Hello"]
    code, out, err = cli("chat", ensemble, "--max-new-tokens", 6, stdin="\n".join(lines))
    assert code == 0
    assert out == answer(ensemble, [{"role": "user", "content": "Hello"}]).text + "\n"
    assert [line.split(";")[0] for line in err.splitlines()][:3] == [
        "error: unknown command '/specialits'",
        "error: unknown specialist 'legal'",
        "error: expected a number, got 'high'",
    ]
    assert "takes at most 256" in err.splitlines()[3]


def test_a_chat_switches_one_specialist_and_compares(cli, ensemble):
    lines = ["/compare", "/specialist medical off", "Hello", "/specialist medical on", "/compare"]
    lines += ["/compare And?", "/specialist legal on", "/specialist medical"]
    code, out, err = cli("chat", ensemble, "--max-new-tokens", 6, stdin="\n".join(lines))
    first = {"role": "user", "content": "Hello"}
    frozen = answer(ensemble, [first], specialists=[]).text
    more = [first, {"role": "assistant", "content": frozen}, {"role": "user", "content": "And?"}]
    texts = [frozen, frozen, answer(ensemble, [first]).text]
    texts += [answer(ensemble, more, specialists=[]).text, answer(ensemble, more).text]
    found = re.sub(
        r"^(frozen anchor|ensemble) \([\d.]+ tokens/s\): ", r"\1: ", out, flags=re.MULTILINE
    )
    titles = ["", "frozen anchor: ", "ensemble: ", "frozen anchor: ", "ensemble: "]
    assert code == 0
    assert found == "".join(f"{title}{text}\n" for title, text in zip(titles, texts, strict=True))
    assert err.splitlines() == [
        "error: nothing to compare yet; write /compare MESSAGE",
        "specialists: none",
        "specialists: medical",
        "error: unknown specialist 'legal'; known: medical",
        "error: expected /specialist NAME on or /specialist NAME off, got 'medical'",
    ]


# Mistakes.

BASE = "BASE"
MISTAKES = [
    (["generate", "/no/such/folder", "x"], "/no/such/folder"),
    (["generate", BASE, ""], "a prompt is a text of at least one character"),
    (["generate", BASE], "no prompt; pass one in quotes, or pipe it in"),
    (["generate", BASE, "two", "words"], "too many words: 'words'; put the prompt in quotes"),
    (["generate", "--anchor", BASE, "two", "words"], "too many words: 'words'"),
    (["generate"], "no prompt"),
    (["info"], "which model? name a saved ensemble or a model, or use --anchor"),
    (["info", BASE, "--anchor", BASE], "name a MODEL or an --anchor, not both"),
    (["info", BASE, "--specialist", f"a={BASE}"], "--specialist needs --anchor"),
    (["info", "--anchor", BASE, "--specialist", BASE], "a specialist is NAME=REF or NAME=REF+"),
    (["info", "--anchor", BASE, "--specialist", f"anchor={BASE}"], "belongs to the anchor"),
    (["info", BASE, "--dtype", "float3"], "dtype 'float3' is unknown"),
    (["info", BASE, "--device-map", "medical=cpu"], "unknown model 'medical'"),
    (["info", BASE, "--device-map", "a=cpu,b"], "expected one value for all or NAME=VALUE"),
    (["generate", BASE, "x", "--temperature", "-1"], "temperature is a finite number"),
    (["generate", BASE, "x", "--specialists", "medical"], "unknown specialist 'medical'"),
    (["generate", BASE, "x", "--strength", "loud"], "expected a number, got 'loud'"),
    (["generate", BASE, "x", "--stream", "--json"], "--stream and --json do not go together"),
    (["specialize", BASE, "/no/such/data", "out"], "training data /no/such/data does not exist"),
    (["specialize", BASE, BASE, "out", "--steps", "0"], "steps must be a whole number"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(cli, base, words, message):
    code, out, err = cli(*(word.replace(BASE, str(base)) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_option_or_command_is_exit_code_2(cli):
    assert cli("generat")[0] == 2
    assert cli("info", "--jason")[0] == 2


def test_debug_shows_the_traceback_wherever_it_stands(cli):
    for words in (["--debug", "info"], ["info", "--debug"]):
        code, _, err = cli(*words)
        assert code == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("error: which model?")


def test_a_missing_library_is_named_with_its_extra(cli, base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    data = tmp_path / "notes.txt"
    data.write_text("The river came down from the hills in spring. " * 40)
    code, _, err = cli("specialize", base, data, tmp_path / "out", "--steps", 1)
    assert code == 2
    assert "rc-agents[train]" in err.splitlines()[-1]


def test_help_and_version(cli):
    code, out, _ = cli("--version")
    assert (code, out) == (0, f"rc-agents {rc_agents.__version__}\n")
    for words in (["--help"], ["generate", "-h"], ["chat", "--help"]):
        code, out, _ = cli(*words)
        assert code == 0
        assert "Usage: rc-agents" in out
    assert app_object is not None


@pytest.mark.parametrize(
    ("text", "read"), [("all", None), (None, None), ("none", []), ("a, b", ["a", "b"])]
)
def test_names(text, read):
    assert names(text) == read


def test_specialists_and_maps_are_read(tmp_path):
    plus = tmp_path / "a+b"
    plus.mkdir()
    assert specialist(f"x={plus}")[1] == rc_agents.ModelRef(base=str(plus))
    read = specialist("x=package:smollm2-135m+package:python")[1]
    assert read == rc_agents.ModelRef(base="package:smollm2-135m", adapter="package:python")
    assert by_name("a=1,b=x", str) == {"a": "1", "b": "x"}
    with pytest.raises(RCError):
        specialist("x=")


# specialize


def test_specialize_makes_an_adapter(cli, base, tmp_path):
    data = tmp_path / "facts.jsonl"
    pairs = [{"question": f"What is {n}?", "answer": f"The {n}th."} for n in range(8)]
    data.write_text("\n".join(map(json.dumps, pairs)))
    words = [base, data, tmp_path / "facts", "--steps", 2, "--batch-size", 4, "--dtype", "float32"]
    code, out, err = cli("specialize", *words, "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    words = ["--anchor", base, "--specialist", f"facts={base}+{tmp_path / 'facts'}"]
    assert cli("generate", "What", *words, "--max-new-tokens", 2)[0] == 0


# serve


def test_serve_says_where_it_listens_as_one_json_line(cli, ensemble, monkeypatch):
    pytest.importorskip("fastapi")
    from rc_agents.adapters.server.run import Server

    asked = []

    async def once(self):
        (port,) = {one.getsockname()[1] for part in self.servers for one in part.sockets}
        loop = asyncio.get_running_loop()
        url = f"http://127.0.0.1:{port}/v1/models"
        asked.append((port, await loop.run_in_executor(None, httpx.get, url)))

    monkeypatch.setattr(Server, "main_loop", once)
    code, out, err = cli("serve", ensemble, "--port", 0, "--name", "mine", "--json")
    ((port, response),) = asked
    assert code == 0
    assert json.loads(out) == {
        "url": f"http://127.0.0.1:{port}",
        "models": [one["id"] for one in response.json()["data"]],
    }
    assert "mine:medical" in out
    assert "GET /v1/models" in err
    assert cli("serve", ensemble, "--port", 0)[1].count("{") == 0


def test_an_anchor_that_serves_says_where_as_one_json_line(cli, ensemble, monkeypatch):
    pytest.importorskip("fastapi")
    from rc_agents.adapters.server.run import Server

    from rc_agents.cli import node as node_module

    async def never(self):
        return None

    model = load(ensemble)
    model.elsewhere = io.StringIO()  # is closed in the end, as the others' connections are
    monkeypatch.setattr(node_module, "connect", lambda *words, **options: model)
    monkeypatch.setattr(Server, "main_loop", never)
    code, out, _ = cli("node", ensemble, "--role", "anchor", "--port", 0, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["url"].startswith("http://127.0.0.1:")
    assert "rc:medical" in found["models"]


@pytest.mark.slow
def test_serve_in_a_process_of_its_own(ensemble):
    with _start("serve", ensemble, "--port", 0, "--json") as process:
        told = json.loads(process.stdout.readline())
        assert httpx.get(told["url"] + "/health").json()["status"] == "ok"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b""
        process.wait(60)


# Specialists in processes of their own.


@contextlib.contextmanager
def _served(path):
    """The options of a command line whose specialist is served over a link, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    node = Node(str(path), "medical", settings=NodeSettings(deadline=20.0))
    arguments = {"patience": 60.0, "once": True}
    thread = threading.Thread(target=node.serve, args=(("127.0.0.1", port),), kwargs=arguments)
    thread.start()
    try:
        yield ["--nodes", f"127.0.0.1:{port}", "--device-map", "cpu"]
        thread.join(30.0)  # by the goodbye of a command that has ended
        assert not thread.is_alive()
        assert node.num_passes > 1
    finally:
        node.close()
        thread.join(30.0)


def test_generate_over_processes(cli, ensemble):
    words = ["generate", ensemble, "Hello", "--max-new-tokens", 6]
    with _served(ensemble) as nodes:
        code, out, err = cli(*words, *nodes)
    assert (code, out) == (0, answer(ensemble, "Hello").text + "\n")
    assert err == f"waiting for the specialists at {nodes[1]}\n"


def test_chat_over_processes(cli, ensemble):
    words = ["chat", ensemble, "--max-new-tokens", 6]
    with _served(ensemble) as nodes:
        code, out, _ = cli(*words, *nodes, stdin="Hello\nand more")
    assert (code, out) == cli(*words, stdin="Hello\nand more")[:2]


def test_serve_over_processes(cli, ensemble, monkeypatch):
    pytest.importorskip("fastapi")
    from rc_agents.adapters.server.run import Server

    asked = []

    async def once(self):
        (port,) = {one.getsockname()[1] for part in self.servers for one in part.sockets}
        body = {"model": "rc", "prompt": "Hello", "max_tokens": 6, "temperature": 0}
        asked_for = functools.partial(httpx.post, json=body, timeout=60)
        url = f"http://127.0.0.1:{port}/v1/completions"
        asked.append(await asyncio.get_running_loop().run_in_executor(None, asked_for, url))

    monkeypatch.setattr(Server, "main_loop", once)
    with _served(ensemble) as nodes:
        assert cli("serve", ensemble, "--port", 0, *nodes)[0] == 0
    (choice,) = asked[0].json()["choices"]
    assert choice["text"] == answer(ensemble, "Hello", temperature=0).text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--anchor", "x", "y", "--nodes", "127.0.0.1:0"], "--nodes needs a saved ensemble"),
        (["x", "y", "--nodes", "127.0.0.1:port"], "expected an address such as 127.0.0.1:29400"),
    ],
)
def test_nodes_that_cannot_work_are_said_in_one_line(cli, words, message):
    code, out, err = cli("generate", *words)
    assert (code, out) == (2, "")
    assert message in err


# Completion in a shell.


@pytest.mark.parametrize(
    ("words", "offered", "hidden"),
    [
        ("rc-agents ", {"chat", "serve", "bench", "eval"}, {"--json"}),
        ("rc-agents ge", {"generate"}, {"chat"}),
        ("rc-agents bench co", {"compare"}, {"report"}),
        ("rc-agents generate --te", {"--temperature"}, {"--top-p"}),
        ("rc-agents serve --", {"--port", "--api-key", "--json"}, {"chat"}),
    ],
)
def test_bash_completes_commands_and_options(cli, monkeypatch, words, offered, hidden):
    monkeypatch.setenv("_RC_AGENTS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    code, out, err = cli()
    found = set(out.split())
    assert (code, err) == (0, "")
    assert offered <= found
    assert not hidden & found


def test_shells_get_a_script_that_asks_for_completions(cli, monkeypatch):
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_RC_AGENTS_COMPLETE", f"source_{shell}")
        code, out, _ = cli()
        assert code == 0
        assert f"_RC_AGENTS_COMPLETE=complete_{shell}" in out
        assert "rc-agents" in out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself_completes(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("_RC_AGENTS_COMPLETE", "source_bash")
    script = cli()[1]
    monkeypatch.delenv("_RC_AGENTS_COMPLETE")
    program = tmp_path / "rc-agents"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rc_agents.cli "$@"\n')
    program.chmod(0o755)
    (function,) = re.findall(r"^(\w+)\(\)", script, re.MULTILINE)
    asked = f"COMP_WORDS=(rc-agents serve --po); COMP_CWORD=2; {function} {program}"
    code = f'{script}\n{asked}\necho "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--port"]


# Signals and pipes.


def _start(*words):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_stream_quietly(base):
    with _start("generate", base, "x", "--stream", "--max-new-tokens", 240) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) != 0


@pytest.mark.slow
def test_ctrl_c_ends_quietly(base):
    with _start("generate", base, "x", "--stream", "--max-new-tokens", 240) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (130, 0)  # 0 where the text was done before the signal came
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_a_chat_in_a_process_of_its_own(base):
    with _start("chat", base, "--max-new-tokens", 4) as process:
        out, err = process.communicate(b"Hello\n/quit\n", timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"\n")


# doctor.


def test_doctor_says_what_is_here_and_how_to_get_the_rest(cli, monkeypatch):
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert all(found["core"].values())
    assert "cpu" in found["devices"]
    assert {"train", "serve", "langchain", "eval", "cli"} <= found["extras"].keys()
    assert "package:smollm2-135m" in found["models"]
    real = doctor_module._version
    monkeypatch.setattr(
        doctor_module, "_version", lambda name: None if name == "peft" else real(name)
    )
    assert "peft" in doctor_module.examine()["extras"]["train"]
    code, out, _ = cli("doctor")
    assert code == 0
    assert "pip install 'rc-agents[train]'" in out
