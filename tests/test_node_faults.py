"""Processes that die, hang, come late or do not belong: nobody waits for ever, and no token is lost."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from rc_agents.benchmarks import faults, shaped
from rc_agents.benchmarks.fault_segment import segment

import rc_agents
from rc_agents.execution import crossing
from rc_agents.execution.wire import (
    MAGIC,
    MOST_BEFORE,
    MOST_BODY,
    PREFIX,
    Channel,
    Frame,
    LinkError,
    readable,
)
from rc_agents.nodes import Node, NodeSettings, connect, read_secret
from tests.connected import connected, linked
from tests.ensembles import ensemble, prompts

pytestmark = pytest.mark.dist
SOON = NodeSettings(deadline=1.0, join=5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ensemble")
    faults.tiny_ensemble(str(place))
    return str(place)


@pytest.fixture(scope="module")
def cluster(folder):
    made = faults.Cluster(folder, SOON)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def apart(folder):
    """Every process in a network namespace of its own."""
    with contextlib.ExitStack() as stack:
        try:
            made = faults.Cluster(folder, SOON, stack.enter_context(segment()))
        except shaped.CannotShape as why:
            pytest.skip(f"this needs {faults.NEEDS}: {why}")
        stack.callback(made.close)
        yield made


def _check(trials, settings):
    wrong = [one for one in trials if not one.survived]
    assert not wrong
    longest = settings.deadline + settings.deadline_per_token * 64
    assert max(one.stall_s for one in trials) < longest + 2.0  # a busy machine's seconds
    assert sum(one.noticed is not None for one in trials) >= len(trials) // 2


def test_ten_faults_cost_no_token(cluster):
    trials = faults.run(cluster, 10, tokens=8, prompt=(4, 32), seed=7)
    _check(trials, SOON)
    assert {one.kind for one in trials} == set(cluster.kinds)
    assert {one.phase for one in trials} == {"prefill", "decode"}


@pytest.mark.slow
def test_a_hundred_faults_cost_no_token(cluster):
    _check(faults.run(cluster, 100, tokens=10, prompt=(4, 64), seed=8), SOON)


def test_a_link_that_is_set_down_costs_no_token(apart):
    trials = faults.run(apart, 2, tokens=8, prompt=(4, 32), seed=7)
    _check(trials, SOON)
    assert {(one.kind, one.phase) for one in trials} == {("down", "prefill"), ("down", "decode")}
    assert all(one.noticed is not None for one in trials)


@pytest.mark.slow
def test_twenty_links_that_are_set_down_cost_no_token(apart):
    _check(faults.run(apart, 20, tokens=10, prompt=(4, 64), seed=8), SOON)


def _carried(namespace, device):
    """Whether a device's link is up, as the kernel says."""
    words = ["ip", "-n", namespace, "-json", "link", "show", device]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return "LOWER_UP" in json.loads(shown)[0]["flags"]


def test_a_cable_is_down_at_both_ends_and_namespaces_go_again():
    try:
        with segment() as network:
            cables = [network.link(("10.231.0.1", 1)) for _ in range(2)]
            ends = [(cable.namespace, "cable") for cable in cables]
            ends += [(network.anchor, "port1"), (network.anchor, "port2")]
            assert [_carried(*end) for end in ends] == [True, True, True, True]
            cables[0].strike("down", 0)
            assert [_carried(*end) for end in ends] == [False, True, False, True]
            cables[0].mend("down")
            assert [_carried(*end) for end in ends] == [True, True, True, True]
    except shaped.CannotShape as why:
        pytest.skip(f"this needs {faults.NEEDS}: {why}")
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert network.tag not in left.stdout


def test_where_no_link_can_be_set_down_the_benchmark_says_so(monkeypatch, capsys, tmp_path):
    def refuse(*words):
        raise shaped.CannotShape("'ip netns add' says: Operation not permitted")

    monkeypatch.setattr(shaped, "command", refuse)
    monkeypatch.setattr(faults.signal, "signal", lambda *_: None)
    words = ["faults", "--kinds", "down", "--faults", "2", "--real", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    faults.main()
    assert "down: left out, as this needs root" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_dead_anchor_frees_the_specialists(folder):
    """The node keeps nothing of an anchor that is gone, and serves the next one."""
    node = Node(folder, "medical", settings=SOON)
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    code = (
        "import sys, torch\nfrom rc_agents.nodes import connect\n"
        f"model = connect({folder!r}, listen='127.0.0.1:{port}', wait=None)\n"
        "model.elsewhere.wait_for(['medical'], 60)\n"
        "model(torch.tensor([[5, 6, 7]]), use_cache=True)\nprint('ready', flush=True)\nsys.stdin.read()\n"
    )
    anchor = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    serving = threading.Thread(
        target=node.serve, args=(("127.0.0.1", port),), kwargs={"patience": 60.0, "once": True}
    )
    serving.start()
    try:
        assert anchor.stdout.readline() == "ready\n"
        assert node.memories
        anchor.kill()
        anchor.wait(10)
        for _ in range(100):
            if not node.memories:
                break
            time.sleep(0.05)
        assert not node.memories
        assert not node.channels
        model = connect(folder, listen=f"127.0.0.1:{port}", settings=SOON, wait=None)
        model.elsewhere.wait_for(["medical"], 20.0)
        model.elsewhere.close()
        serving.join(10)
        assert not serving.is_alive()
    finally:
        anchor.stdin.close()
        anchor.stdout.close()
        node.close()


def test_a_text_may_begin_without_a_specialist_and_the_next_has_it(folder):
    single = rc_agents.CoupledForCausalLM.from_pretrained(folder)
    ids = prompts(1, 9)
    model = connect(folder, settings=SOON, wait=None)
    nodes = [Node(folder, name, settings=SOON) for name in single.specialists]
    threads = [
        threading.Thread(
            target=n.serve, args=(model.elsewhere.door.address,), kwargs={"once": True}
        )
        for n in nodes
    ]
    try:
        with single.disabled():
            alone = single(ids).logits
        out = model(ids, use_cache=True)
        assert torch.equal(out.logits, alone)
        assert out.lost == dict.fromkeys(single.specialists, "its process is not there")
        for thread in threads:
            thread.start()
        model.elsewhere.wait_for(single.specialists, 20.0)
        # The text that began without them goes on without them.
        again = model(ids, past_key_values=out.past_key_values, use_cache=True)
        assert set(again.lost) == set(single.specialists)
        assert model.elsewhere.connected == single.specialists
        new = model(ids)
        assert new.lost is None
        assert torch.equal(new.logits, single(ids).logits)
    finally:
        model.elsewhere.close()
        for node, thread in zip(nodes, threads, strict=True):
            node.close()
            if thread.ident:
                thread.join(10)


def test_a_cache_of_before_is_not_taken_up_by_a_process_that_came_back(cluster):
    ids = prompts(1, 8)
    begun = cluster.model(ids, use_cache=True)
    cluster.strike("law", "kill", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster.specialists["law"].process.join(10)
        cluster.model(ids)  # notices
        cluster.mend("law", "kill")
        out = cluster.model(ids, past_key_values=begun.past_key_values, use_cache=True)
    assert list(out.lost) == ["law"]
    expected = cluster.single(ids, use_cache=True)
    with cluster.single.disabled("law"):
        expected = cluster.single(ids, past_key_values=expected.past_key_values)
    assert torch.equal(out.logits, expected.logits)


def test_a_model_that_fails_is_left_out_and_its_process_serves_on():
    one, ids = ensemble("llama", "gpt2"), prompts()
    with linked(one) as (model, nodes):

        def fail(*args):
            handle.remove()
            raise IndexError("no such row")

        handle = nodes["medical"].model.register_forward_pre_hook(fail)
        with pytest.warns(
            UserWarning, match="'medical' is lost .it failed: IndexError: no such row"
        ):
            out = model(ids)
        assert list(out.lost) == ["medical"]
        with one.disabled("medical"):
            assert torch.equal(out.logits, one(ids).logits)
        model.elsewhere.wait_for(["medical"], 20.0)
        assert torch.equal(model(ids).logits, one(ids).logits)


# Who may join.


def _joining(folder, name, address, **settings):
    node = Node(folder, name, settings=NodeSettings(deadline=1.0, join=2.0, **settings))
    try:
        node.serve(address, patience=0.5, once=True)
    finally:
        node.close()


def test_another_secret_is_refused(folder):
    model = connect(folder, settings=NodeSettings(join=2.0, secret=b"one" * 8), wait=None)
    address = model.elsewhere.door.address
    try:
        for secret in (b"", b"two" * 8):
            with pytest.raises(LinkError, match="another secret; give both the same"):
                _joining(folder, "medical", address, secret=secret)
        assert model.elsewhere.connected == []
    finally:
        model.elsewhere.close()


def test_another_ensemble_is_refused(folder, tmp_path):
    faults.tiny_ensemble(str(tmp_path), seed=1)
    model = connect(folder, settings=SOON, wait=None)
    try:
        with pytest.raises(LinkError, match=r"another ensemble .*the same checkpoint and bases"):
            _joining(str(tmp_path), "medical", model.elsewhere.door.address)
    finally:
        model.elsewhere.close()


def test_weights_of_another_dtype_are_told_and_run(folder, caplog):
    model = connect(folder, settings=SOON, wait=None)
    node = Node(folder, "medical", settings=SOON, dtype="bfloat16")
    address = model.elsewhere.door.address
    thread = threading.Thread(target=node.serve, args=(address,), kwargs={"once": True})
    thread.start()
    try:
        model.elsewhere.wait_for(["medical"], 20.0)
        assert model.elsewhere.dtypes == {"anchor": "float32", "medical": "bfloat16"}
        assert "medical has its weights in bfloat16, the checkpoint in float32" in caplog.text
        assert model(prompts(1, 6)).logits.isfinite().all()
    finally:
        model.elsewhere.close()
        node.close()
        thread.join(20.0)


def test_a_process_that_names_no_dtype_is_refused(folder, monkeypatch):
    card = Node.card
    monkeypatch.setattr(Node, "card", lambda self: {**card(self), "dtype": "float1"})
    model = connect(folder, settings=SOON, wait=None)
    try:
        with pytest.raises(
            LinkError, match="no dtype of its weights that is known here, got 'float1'"
        ):
            _joining(folder, "medical", model.elsewhere.door.address)
    finally:
        model.elsewhere.close()


def test_a_second_process_of_one_specialist_is_refused(cluster, folder):
    with pytest.raises(LinkError, match="'medical' is there already"):
        _joining(folder, "medical", cluster.hub.door.address)


def test_nobody_there_and_nobody_coming_are_said(folder):
    with pytest.raises(
        LinkError, match=r"no process of medical, law came within 0.1 s; start: rc-agents node"
    ):
        connect(folder, settings=SOON, wait=0.1)
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = place.getsockname()
    with pytest.raises(LinkError, match=r"could not join .* start the anchor's process"):
        _joining(folder, "medical", address)
    with pytest.raises(rc_agents.RCError, match="one of the ensemble's specialists, got 'anchor'"):
        Node(folder, "anchor")


def test_nonsense_at_the_door_leaves_it_open(cluster):
    ids = prompts(1, 6)
    for data in (b"GET / HTTP/1.1\r\n\r\n" * 9, random.Random(0).randbytes(4096), b""):
        with socket.create_connection(cluster.hub.door.address) as visitor:
            visitor.sendall(data)
            with contextlib.suppress(OSError):  # the door may have closed it already
                visitor.shutdown(socket.SHUT_WR)
            visitor.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while visitor.recv(4096):
                    pass
    assert torch.equal(cluster.model(ids).logits, cluster.single(ids).logits)


def test_beyond_loopback_a_secret_is_needed(folder, tmp_path):
    with pytest.raises(rc_agents.RCError, match="give every process the same secret"):
        connect(folder, listen="0.0.0.0:0", wait=None)
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(rc_agents.RCError, match="3 bytes, at least 16"):
        read_secret(tmp_path / "short")


# Frames.


def test_frames_cross_whole_and_damaged_ones_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far = server.accept()[0]
    one, other = Channel(near, "far", 5.0), Channel(far, "near", 5.0)
    other.most = MOST_BODY  # as whoever has been let in may send
    tensors = {
        "big": torch.randn(3, 700, 1024),
        "half": torch.randn(2, 3).bfloat16(),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.randn(4, 5).T,
    }
    frame = Frame("state", {"pass": 3, "site": 1}, tensors)
    for _ in range(3):
        one.send(frame)
    got = []
    end = time.monotonic() + 20
    while len(got) < 3 and time.monotonic() < end:
        got += other.frames()
    assert len(got) == 3
    for each in got:
        assert (each.kind, each.fields) == ("state", {"pass": 3, "site": 1})
        for name, tensor in tensors.items():
            assert each.tensors[name].dtype == tensor.dtype
            assert torch.equal(each.tensors[name], tensor)
    header = b'{"kind": "state", "n": 0, "tensors": [["x", "float32", [5]]]}'
    for wrong in (b"", b"12345678", b"\x00" * 24):
        with pytest.raises(LinkError, match="a frame came"):
            Frame.read(header, bytearray(wrong))
    with pytest.raises(LinkError, match="frame 0 came where frame 7 was to come"):
        Frame.read(header, bytearray(20), 7)
    one.send(Frame("weights", {}, {str(n): torch.zeros(1) for n in range(2500)}))
    while not (got := list(other.frames())):
        time.sleep(0.01)
    assert len(got[0].tensors) == 2500
    near.send(b"XXXX" + bytes(60))
    with pytest.raises(LinkError, match="no frame"):
        list(other.frames())
    one.close()
    other.close()


def test_a_stranger_cannot_make_the_door_hold_much(folder):
    """Before it has shown that it belongs, a visitor's frame holds a few kilobytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        channel = Channel(server.accept()[0], "stranger", 5.0)
    near.sendall(PREFIX.pack(MAGIC, 10, MOST_BEFORE + 1))
    assert readable(channel, 5.0)
    with pytest.raises(LinkError, match="no frame"):
        list(channel.frames())
    near.close()
    channel.close()


# What a review found.


def test_a_pass_that_is_interrupted_leaves_the_specialists_in_step():
    one, ids = ensemble("llama", "gpt2"), prompts()
    with linked(one) as (model, _):
        for error in (KeyboardInterrupt, ValueError):
            for block in (0, 2, 3):

                def interrupt(*args, error=error):
                    raise error

                layer = model.models["anchor"].model.layers[block]
                handle = layer.register_forward_hook(interrupt)
                with pytest.raises((KeyboardInterrupt, RuntimeError)):
                    model(ids, use_cache=True)
                handle.remove()
                out = model(ids, use_cache=True)
                assert out.lost is None
                assert torch.equal(out.logits, one(ids, use_cache=True).logits)


def _failing_once(node):
    """Makes a specialist's next forward fail."""

    def fail(*args):
        handle.remove()
        raise IndexError("once")

    handle = node.model.register_forward_pre_hook(fail)


@pytest.mark.filterwarnings("ignore:specialist 'law' is lost")
def test_whoever_is_not_lost_goes_on_after_a_catch_up_and_with_steered_outputs():
    one, ids = ensemble("llama", "gpt2", "qwen2"), prompts(1, 6)
    with linked(one) as (model, nodes), torch.no_grad():
        begun, expected = model(ids, use_cache=True), one(ids, use_cache=True)
        caches = []
        for each, cache in ((model, begun.past_key_values), (one, expected.past_key_values)):
            with each.disabled("medical"):
                caches.append(each(ids, past_key_values=cache, use_cache=True).past_key_values)
        _failing_once(nodes["law"])  # in the pass before which medical catches up
        out = model(ids, past_key_values=caches[0], use_cache=True, output_steered=True)
        assert list(out.lost) == ["law"]
        assert set(out.steered_logits) == {"anchor", "medical"}
        with one.disabled("law"):
            expected = one(ids, past_key_values=caches[1], use_cache=True)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_a_backward_that_cannot_be_run_is_said_and_the_process_serves_on():
    one, ids = ensemble("llama", "gpt2", topology="star_bilateral"), prompts()
    with connected(one, trains=True) as model:
        first = model(ids, labels=ids).loss
        for _ in range(9):
            model(ids, labels=ids)
        with pytest.raises(
            rc_agents.RCError, match="keeps those of 8 passes, each for one backward"
        ):
            first.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.elsewhere.wait_for(["medical"], 20.0)
            model.zero_grad()
            losses = [each(ids, labels=ids).loss for each in (model, one)]
        for loss in losses:
            loss.backward()
        for name, value in one.trainable_parameters():
            torch.testing.assert_close(dict(model.trainable_parameters())[name].grad, value.grad)


@pytest.mark.filterwarnings("ignore:specialist 'medical' is lost")
def test_a_state_of_another_shape_is_no_state(monkeypatch):
    one, ids = ensemble("llama", "gpt2", topology="unilateral"), prompts()
    with linked(one) as (model, nodes):
        show = crossing.Crossing.show

        def cut(self, site, hidden, targets=None):
            return show(
                self, site, hidden[:, :1] if self.rank.name == "medical" else hidden, targets
            )

        monkeypatch.setattr(crossing.Crossing, "show", cut)
        out = model(ids)
        assert "expected" in out.lost["medical"]
        assert nodes["medical"].num_passes == 1
        assert torch.equal(out.logits, ensemble("llama", "gpt2", awake=False)(ids).logits)


@pytest.mark.filterwarnings("ignore:specialist .* is lost")
def test_a_cache_that_is_emptied_begins_a_new_text(folder):
    single = rc_agents.CoupledForCausalLM.from_pretrained(folder)
    model = connect(folder, settings=SOON, wait=None)
    try:
        cache = model(prompts(1, 5), use_cache=True).past_key_values
        assert set(cache.lost) == set(single.specialists)
        cache.reset()
        assert not cache.lost
    finally:
        model.elsewhere.close()


# As a user starts it.


def _command(*words, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "rc_agents", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
    )


@pytest.mark.slow
def test_two_commands_on_two_terminals(tmp_path):
    one = _spoken(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    specialist = _command(
        "node",
        str(tmp_path),
        "--role",
        "specialist",
        "--name",
        "medical",
        "--connect",
        f"127.0.0.1:{port}",
        "--once",
    )
    anchor = _command(
        "node", str(tmp_path), "--role", "anchor", "--listen", f"127.0.0.1:{port}", "--prompt", "the people",
        "--max-new-tokens", "6",
    )  # fmt: skip
    out, err = anchor.communicate(timeout=120)
    assert anchor.returncode == 0, err
    specialist.communicate(timeout=30)
    assert specialist.returncode == 0
    assert out.strip("\n") == _text(one, "the people", 6)


@pytest.mark.slow
def test_torchrun_starts_all(tmp_path):
    one = _spoken(tmp_path)
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "rc_agents", "node", str(tmp_path), "--prompt", "the people", "--max-new-tokens", "6",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert _text(one, "the people", 6) in run.stdout


def _spoken(place):
    from tests.spans import span_ensemble

    one = span_ensemble(("llama", "prose"), ("gpt2", "code"))
    one.save_pretrained(place, include_bases=True)
    return rc_agents.CoupledForCausalLM.from_pretrained(place)


def _text(model, prompt, tokens):
    from rc_agents.service import GenerationParams, GenerationService

    return GenerationService(model).generate(prompt, GenerationParams(max_new_tokens=tokens)).text
