"""A reward in another process: pixels and prompts arrive whole, faults are told, only this machine is asked."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from retort.hosts import reward_server, rewards
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
                "http://127.0.0.1.example.org:80", "http://127.0.0.1:port", ""],
)  # fmt: skip
def test_only_this_machine_is_asked(host, address):
    with pytest.raises(ValueError, match="not a server on this machine"):
        rewards.make(host, "remote", {"url": address})


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
