"""Links of set bandwidth and latency: bytes come late and whole, namespaces go again, figures are the cost model's."""

import socket
import subprocess
import sys
import time

import pytest
from rc_agents.benchmarks import extrapolate, links, shaped, wires
from rc_agents.benchmarks.cost_model import Port

pytestmark = pytest.mark.unit


def test_a_delayed_link_keeps_order_and_does_not_add_delays_up():
    near, inner = socket.socketpair()
    outer, far = socket.socketpair()
    shaped.forward(inner, outer, lambda: 0.2)
    parts = [bytes([number]) * 1000 for number in range(200)]
    begun, came = time.monotonic(), b""
    for part in parts:
        near.sendall(part)
        time.sleep(0.001)  # so that they are taken in apart from each other
    far.settimeout(30.0)
    while len(came) < 200_000:
        came += far.recv(1 << 16)
        assert time.monotonic() - begun >= 0.2
    assert came == b"".join(parts)
    assert time.monotonic() - begun < 20.0  # 200 delays one after another were 40 s
    near.close()
    assert far.recv(1) == b""
    for sock in (inner, outer, far):
        sock.close()


def test_namespaces_are_shaped_and_removed():
    try:
        with shaped.namespaces() as spaces:
            spaces.shape(1e7, 5e7)
            shown = [
                subprocess.run(
                    ["tc", "-n", name, "qdisc"], capture_output=True, text=True, check=True
                ).stdout
                for name in (spaces.anchor, spaces.specialist)
            ]
            assert "rate 50Mbit" in shown[0]
            assert "rate 10Mbit" in shown[1]
    except shaped.CannotShape as why:
        pytest.skip(f"network namespaces with tbf cannot be made here: {why}")
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert spaces.anchor not in left.stdout
    assert spaces.specialist not in left.stdout


def test_where_nothing_can_be_shaped_the_benchmark_says_so(monkeypatch, capsys):
    def refuse(*words):
        raise shaped.CannotShape("'ip netns add' says: Operation not permitted")

    monkeypatch.setattr(shaped, "command", refuse)
    monkeypatch.setattr(sys, "argv", ["links"])
    monkeypatch.setattr(links.signal, "signal", lambda *_: None)
    links.main()
    assert "skipped: this needs root" in capsys.readouterr().out


def test_extrapolated_cells_say_what_is_sensible():
    size = extrapolate.Size("small", 64, 0.010, 0.1)
    port = Port(up=1e9, down=1e9)
    near, far = (extrapolate.Link("link", latency, port, port) for latency in (1e-4, 0.05))
    close = extrapolate.cell(size, near, "unilateral", 5, 1, "exact")
    assert close.count("**") == 4  # both a token and a prompt
    wide = extrapolate.cell(size, far, "star_bilateral", 5, 1, "exact")
    assert "*" not in wide
    token, prompt = (float(one) for one in wide.split(" / "))
    assert token == pytest.approx(10 + 6 * 50, rel=0.02)
    assert prompt == pytest.approx(0.1 + 6 * 0.05, rel=0.05)


def test_perplexities_are_compared_document_by_document():
    nats = {"exact": [10.0, 20.0, 30.0], "int8": [10.1, 20.1, 30.1]}
    found = wires.summary(nats, 10)
    assert found["exact"] == {"perplexity": pytest.approx(7.38906, abs=1e-4)}
    assert found["int8"]["percent"]["value"] == pytest.approx(1.005, abs=1e-3)
    assert found["int8"]["percent"]["low"] == pytest.approx(1.005, abs=1e-3)
