"""A reward in another process: pixels and prompts arrive whole, faults are told, only this machine is asked."""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from retort.hosts import reward_server
from retort.hosts.rewards import kinds as rewards
from retort.hosts.rewards import remote as reward_remote
from retort.rewards.scoring import score

ROOT = Path(__file__).resolve().parents[2]
SCORER = """
NAME, RANGE = "redness", (0.0, float("inf"))
def score(images, prompts):
    if prompts[0] == "fail":
        raise RuntimeError("out of memory")
    if prompts[0] == "few":
        return [1.0]
    if prompts[0] == "nan":
        return [float("nan")] * len(images)
    return [image.getpixel((0, 0))[0] + 1000 * len(prompt) for image, prompt in zip(images, prompts)]
"""


@pytest.fixture
def url(tmp_path):
    """A server in a thread of this process."""
    (tmp_path / "scorer.py").write_text(SCORER, encoding="utf-8")
    made = reward_server.server(reward_server.scorer(tmp_path / "scorer.py"), 0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


def test_scores_come_back(host, url, images):
    reward = rewards.make(host, "remote", {"url": url})
    assert (reward.name, reward.range, reward.differentiable) == ("redness", (0.0, math.inf), False)
    prompts = ["a", "bb", "ccc", "d"]
    wanted = (images[:, 0, 0, 0] * 255).round() + 1000 * torch.tensor([1, 2, 3, 1])
    assert torch.equal(score(reward, images, prompts), wanted)
    assert torch.equal(score(reward, images, prompts, batch=1), wanted)
    for prompt, match in (("fail", "RuntimeError: out of memory"), ("few", "for 4 images"), ("nan", "nan for image 0")):
        with pytest.raises(ValueError, match=match):
            score(reward, images, prompt)
    # And it goes on afterwards.
    assert torch.equal(score(reward, images, prompts), wanted)


@pytest.mark.parametrize(
    "address", ["http://example.org:80", "https://127.0.0.1:1", "file:///etc/passwd", "http://127.0.0.1", "http://a@127.0.0.1:1",
                "http://127.0.0.1.example.org:80", "http://127.0.0.1:port", "", "http://127.0.0.1:8377/admin/delete?x=1",
                "http://127.0.0.1:8377/admin", "http://127.0.0.1:8377/?x=1", "http://127.0.0.1:8377?", "http://127.0.0.1:8377/#a",
                "http://:b@127.0.0.1:8377", "http://127.0.0.1:8377//a"],
)  # fmt: skip
def test_only_this_machine_is_asked(host, address):
    with pytest.raises(ValueError, match="not a server on this machine"):
        rewards.make(host, "remote", {"url": address})


@pytest.fixture
def dripping():
    """A server that sends its answer byte by byte, for ever."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve():
            with contextlib.suppress(OSError):
                line, _ = listening.accept()
                line.recv(4096)
                line.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
                while True:
                    line.sendall(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    # Whoever waited has hung up.
    thread.join(10)
    assert not thread.is_alive()


def test_a_server_that_never_ends_is_left(host, dripping, monkeypatch):
    monkeypatch.setattr(reward_remote, "ASKING", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match="no whole answer within 0.5 seconds"):
        rewards.make(host, "remote", {"url": dripping})
    assert time.monotonic() - began < 8


def test_cancelling_ends_the_waiting(dripping):
    class CancelledError(Exception):
        pass

    looked = []

    def check():
        looked.append(1)
        if len(looked) > 3:
            raise CancelledError

    with pytest.raises(CancelledError):
        reward_remote.RemoteReward(dripping, check)


def sent(url, text, timeout=20.0):
    """The first line of what a server answers to a text."""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout) as line:
        line.sendall(text.encode())
        return line.recv(100).decode().splitlines()[0]


def test_one_that_stalls_holds_up_nobody(host, url, images):
    port = int(url.rsplit(":", 1)[1])
    head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
    try:
        for line, begun in zip(stalled, ("", "POST", head, head + "{"), strict=True):
            line.sendall(begun.encode())
        began = time.monotonic()
        assert score(rewards.make(host, "remote", {"url": url}), images, "a").shape == (4,)
        assert time.monotonic() - began < 8
    finally:
        for line in stalled:
            line.close()


def test_only_programs_of_this_machine_are_answered(url):
    port = url.rsplit(":", 1)[1]
    for host_name, more, status in (
        (f"127.0.0.1:{port}", "", 200), (f"localhost:{port}", "", 200), (f"[::1]:{port}", "", 200),
        (f"evil.example:{port}", "", 403), ("evil.example", "", 403), ("", "", 403),
        (f"127.0.0.1:{port}", f"Origin: http://127.0.0.1:{port}\r\n", 403),
        (f"127.0.0.1:{port}", "Sec-Fetch-Site: same-origin\r\n", 403),
    ):  # fmt: skip
        assert f" {status} " in sent(url, f"GET / HTTP/1.1\r\nHost: {host_name}\r\n{more}\r\n"), (host_name, more)
    here = f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    for length in ("abc", "-1", "9" * 5000, "", "99999999999", "٣"):
        assert " 400 " in sent(url, f"{here}Content-Length: {length}\r\n\r\n")
    assert " 400 " in sent(url, f"{here}Transfer-Encoding: chunked\r\n\r\n")


def test_an_answer_that_is_none_is_told(host, monkeypatch):
    for answer in (
        b"[" * 100_000,
        b"[1]",
        b'{"name": "x", "range": [1, "y"]}',
        b'{"name": "x", "range": [2, 1]}',
        b"x" * 2**21,
    ):
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()

            def serve(listening=listening, answer=answer):
                line, _ = listening.accept()
                line.recv(4096)
                with contextlib.suppress(OSError):
                    line.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + answer)
                line.close()

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            with pytest.raises(ValueError, match="reward server"):
                rewards.make(host, "remote", {"url": f"http://127.0.0.1:{listening.getsockname()[1]}"})
            thread.join(10)


def test_nobody_there(host):
    with pytest.raises(ValueError, match="does not answer.*reward_server.py"):
        rewards.make(host, "remote", {"url": "http://127.0.0.1:9"})


def test_a_form_of_a_web_page_is_refused(url):
    request = urllib.request.Request(url, b"{}", {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_as_a_process_without_retort(tmp_path, host, images):
    (tmp_path / "scorer.py").write_text(SCORER, encoding="utf-8")
    command = [
        sys.executable,
        "-I",
        str(ROOT / "hosts" / "reward_server.py"),
        str(tmp_path / "scorer.py"),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            line = process.stderr.readline()
            reward = rewards.make(host, "remote", {"url": line.rsplit(" ", 1)[1].strip()})
            began = time.monotonic()
            assert score(reward, images, "a").shape == (4,)
            assert time.monotonic() - began < 30
        finally:
            process.terminate()


def test_a_file_that_scores_nothing(tmp_path):
    (tmp_path / "scorer.py").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="defines no score"):
        reward_server.scorer(tmp_path / "scorer.py")
    with pytest.raises(ValueError, match="is not a Python file"):
        reward_server.scorer(tmp_path / "missing.py")
