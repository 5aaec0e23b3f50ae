"""The doors on ComfyUI's server: what another page, a forger or a flood meets there."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from retort.hosts.comfyui import run_routes, search_routes  # noqa: E402
from retort.trainers.watch import METRICS  # noqa: E402


@pytest.fixture
def ask(tmp_path):
    """ask(method, path, **options) -> (status, headers, text), of a server whose folders lie in tmp_path."""
    run = tmp_path / "runs" / "<b>mine<b>".replace("<", "[").replace(">", "]")
    (run / "previews").mkdir(parents=True)
    (run / METRICS).write_text('{"step": 1, "student_loss": 2}\n')
    (run / "previews" / "step_0000001.png").write_bytes(b"<script>alert(1)</script>")

    def one(method, path, **options):
        async def whole():
            table = web.RouteTableDef()
            run_routes.add(table, lambda: tmp_path / "runs")
            search_routes.add(table, *(lambda name=name: tmp_path / name for name in ("records", "saved", "input")))
            app = web.Application(client_max_size=2**27)
            app.add_routes(table)
            async with TestClient(TestServer(app)) as client:
                answer = await client.request(method, f"/retort/{path}", **options)
                return answer.status, answer.headers, await answer.text(errors="replace")

        return asyncio.run(whole())

    return one


RUN = "runs/[b]mine[b]"


def test_its_own_page_is_answered(ask):
    for headers in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        status, sent, text = ask("GET", f"{RUN}/log", headers=headers)
        assert status == 200 and '"steps": [1]' in text
        assert sent["X-Content-Type-Options"] == "nosniff" and sent["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
     {"Sec-Fetch-Site": "same-site"}],
)  # fmt: skip
@pytest.mark.parametrize("method, path", [("GET", f"{RUN}/log"), ("GET", "searches"), ("POST", f"{RUN}/command")])
def test_another_page_is_refused(ask, method, path, headers):
    options = {"json": {"command": "stop"}} if method == "POST" else {}
    assert ask(method, path, headers=headers, **options)[0] == 403


def test_what_a_form_can_send_is_refused(ask):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask("POST", f"{RUN}/command", data=b'{"command": "stop"}', headers={"Content-Type": kind})[0] == 415


def test_a_flood_is_refused(ask):
    headers = {"Content-Type": "application/json"}
    assert ask("POST", f"{RUN}/command", data=b"[" * 100_000_000, headers=headers)[0] == 413

    async def chunks():
        for _ in range(100):
            yield b"[" * 10_000

    assert ask("POST", f"{RUN}/command", data=chunks(), headers=headers)[0] == 413
    assert ask("POST", f"{RUN}/command", data=b"[" * 60_000, headers=headers)[0] == 400


def test_names_and_numbers_are_checked(ask):
    for path, status in (
        ("runs/..%2F..%2Fetc/log", 400), ("runs/other/previews/step_0000001.png", 404), (f"{RUN}/log?offset=-1", 400),
        (f"{RUN}/log?offset=1e9", 400), (f"{RUN}/log?step=x", 400), (f"{RUN}/log?run=other", 200),
        (f"{RUN}/log?body=1", 400), (f"{RUN}/previews/..%2Fmetrics.jsonl", 400), ("searches/x", 400),
        ("searches/20200101-000000-00000000/0/..%2F1.jpg", 400),
        ("searches/20200101-000000-00000000/0/1.jpg", 404),
    ):  # fmt: skip
        assert ask("GET", path)[0] == status, path
    assert ask("POST", f"{RUN}/command", json={"command": "rm"})[0] == 400
    assert ask("POST", "searches/20200101-000000-00000000/take", json={"item": "../0", "number": 1})[0] == 400


def test_a_run_that_is_not_there_yet_has_an_empty_log(ask):
    status, _, text = ask("GET", "runs/other/log")
    assert (status, text) == (200, "{}")


def test_whatever_a_picture_holds_it_is_sent_as_one(ask):
    status, sent, _ = ask("GET", f"{RUN}/previews/step_0000001.png")
    assert status == 200 and sent["Content-Type"] == "image/png"
