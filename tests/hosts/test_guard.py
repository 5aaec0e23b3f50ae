"""The routes on ComfyUI's server: what another page, a forger or a flood meets there."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from retort.benchmarks import hostile_headers  # noqa: E402
from retort.hosts.comfyui import guard, run_routes, search_routes  # noqa: E402
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
            run_routes.add(table, lambda: tmp_path / "runs", lambda: tmp_path / "loras")
            search_routes.add(table, *(lambda name=name: tmp_path / name for name in ("records", "saved", "input")))
            app = web.Application(client_max_size=2**27)
            app.add_routes(table)
            async with TestClient(TestServer(app)) as client:
                answer = await client.request(method, f"/retort/{path}", **options)
                return answer.status, answer.headers, await answer.text(errors="replace")

        return asyncio.run(whole())

    return one


RUN = "runs/[b]mine[b]"
HERE = "127.0.0.1:8188"


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


def test_only_who_calls_the_server_by_its_address_or_a_known_name_is_its_page(ask, monkeypatch):
    cases = hostile_headers.sets(HERE)
    found = {name: ask("GET", f"{RUN}/log", headers={"Host": HERE} | sent)[0] for name, (sent, _) in cases.items()}
    passed = {name: own for name, (_, own) in cases.items()}
    assert len(found) == 24 and {name: status == 200 for name, status in found.items()} == passed
    # A Host or Origin that is malformed may also be refused by the server itself.
    assert set(found.values()) <= {200, 400, 403}
    mine = {"Host": "Studio.lan:8188", "Origin": "http://studio.lan:8188", "Sec-Fetch-Site": "same-origin"}
    status, _, text = ask("GET", "runs", headers=mine)
    assert status == 403 and "studio.lan" in text and "RETORT_HOSTS" in text
    monkeypatch.setenv("RETORT_HOSTS", "other.lan, studio.lan")
    assert ask("GET", "runs", headers=mine)[0] == 200
    monkeypatch.delenv("RETORT_HOSTS")
    monkeypatch.setattr(guard, "_listening", set())
    guard.listen_at(["127.0.0.1", " studio.lan"])
    assert ask("GET", "runs", headers=mine)[0] == 200
    assert ask("GET", "runs", headers=mine | {"Host": "studio.lan.evil.example"})[0] == 403


def test_a_header_that_is_given_twice_is_refused():
    own = ["127.0.0.1:1"]
    assert guard.stranger(own, [], []) == ""
    for hosts, origins, sites in ((own * 2, [], []), (own, ["http://127.0.0.1:1"] * 2, []), (own, [], ["none"] * 2)):
        assert "twice" in guard.stranger(hosts, origins, sites)
    assert guard.stranger([], [], [])


def test_an_answer_is_bounded_finite_and_made_beside_the_event_loop():
    seen = []

    def much():
        seen.append(threading.current_thread().name)
        return {"a": [0] * 400_000}

    def odd():
        return {"values": [float("nan"), 1.5, float("-inf")], "text": "half \ud800 a pair"}

    def broken():
        raise OverflowError("too large")

    assert "more than" in served(much)[1] and served(much)[0] == 500
    assert all(name.startswith("retort route") for name in seen)
    status, text = served(odd)
    assert status == 200 and json.loads(text) == {"values": [None, 1.5, None], "text": "half ? a pair"}
    assert served(broken) == (500, '{"error": "OverflowError: too large"}')


def test_other_requests_are_served_while_ours_wait(monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(guard, "_places", threading.BoundedSemaphore(20))

    async def others(_):
        return web.Response(text=await asyncio.get_running_loop().run_in_executor(None, lambda: "a file of ComfyUI's"))

    async def whole():
        app = web.Application()
        app.add_routes([web.get("/ours", guard.guarded(lambda: {"late": go_on.wait(30)})), web.get("/others", others)])
        async with TestClient(TestServer(app)) as client:
            slow = [asyncio.ensure_future(client.get("/ours")) for _ in range(30)]
            while len(full := [one for one in slow if one.done()]) < 10:
                await asyncio.sleep(0.01)
            assert {one.result().status for one in full} == {503}
            assert await (await client.get("/others")).text() == "a file of ComfyUI's"
            go_on.set()
            assert sorted([(await one).status for one in slow]) == [200] * 20 + [503] * 10

    asyncio.run(whole())


def test_a_picture_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MOST_PICTURE", 100)
    (tmp_path / "a.png").write_bytes(b"0" * 101)
    assert served(lambda: tmp_path / "a.png")[0] == 400


def served(work):
    """(status, text) of an answer that `work` gives."""

    async def whole():
        app = web.Application()
        app.add_routes([web.get("/one", guard.guarded(work))])
        async with TestClient(TestServer(app)) as client:
            answer = await client.get("/one")
            return answer.status, await answer.text()

    return asyncio.run(whole())


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
