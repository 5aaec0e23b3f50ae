"""The picker's routes on a server of their own: what they answer, what they refuse, and that nothing leaves the set."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from retort.files.atomic import locked  # noqa: E402
from retort.hosts.comfyui import picker_routes  # noqa: E402
from retort.preferences import store as preferences  # noqa: E402
from retort.preferences import tickets

URL = "/retort/picker/taste"


@pytest.fixture
def folder(tmp_path):
    """A set of six pictures, of which a ticket of two and one of four wait for "pick"."""
    folder = tmp_path / "sets" / "taste"
    names = [preferences.keep_image(folder, torch.full((4, 6, 3), i / 6)) for i in range(6)]
    given = (("<b>a seven</b>", names[:2]), ("a", names[2:]))
    asked = [tickets.Ticket(prompt, tuple(files), by="pick") for prompt, files in given]
    tickets.ask(folder, asked)
    return folder


@pytest.fixture
def served(folder):
    """served(coroutine of a client): what it gives, on a server whose sets lie beside `folder`."""

    def run(what):
        async def whole():
            table = web.RouteTableDef()
            picker_routes.add(table, lambda: folder.parent)
            app = web.Application(client_max_size=2**27)
            app.add_routes(table)
            async with TestClient(TestServer(app)) as client:
                return await what(client)

        return asyncio.run(whole())

    return run


@pytest.fixture
def ask(served):
    """ask(path, body, ...) -> (status, JSON)."""

    def one(path, body=None, headers=None, **more):
        async def what(client):
            if body is None:
                answer = await client.get(URL + path, headers=headers, **more)
            else:
                given = {"data": body} if isinstance(body, bytes) else {"json": body}
                answer = await client.post(URL + path, headers=headers, **given, **more)
            return answer.status, await answer.json()

        return served(what)

    return one


def test_a_blind_test_tells_who_drew_what_after_its_last_answer(ask, folder):
    names = sorted(preferences.keep_image(folder, torch.full((4, 6, 3), i / 8)) for i in range(4))
    given = ((names[:2], ("base", "tuned")), (names[2:], ("tuned", "base")))
    made = [tickets.Ticket("a", tuple(pair), by="blind 1", models=sides) for pair, sides in given]
    first, second = tickets.ask(folder, made)
    _, seen = ask("/tickets?by=blind%201")
    assert seen["blind"] is True and seen["result"] is None and "models" not in json.dumps(seen)
    assert ask("/answer?by=blind%201", {"id": first, "choice": 1})[1]["result"] is None
    # One of one: Clopper and Pearson's interval begins at 0.025 and ends at 1.
    _, seen = ask("/answer?by=blind%201", {"id": second, "choice": "skip"})
    assert seen["result"] == {"wins": 1, "of": 1, "ties": 0, "low": pytest.approx(0.025), "high": 1.0}
    _, seen = ask("/take_back?by=blind%201", {"id": second})
    assert seen["result"] is None
    _, seen = ask("/answer?by=blind%201", {"id": second, "choice": 1})
    assert {key: seen["result"][key] for key in ("wins", "of", "ties")} == {"wins": 1, "of": 2, "ties": 0}
    assert "blind" not in ask("/tickets?by=pick")[1]


def test_a_ticket_is_shown_answered_and_taken_back(ask, folder):
    status, state = ask("/tickets?by=pick")
    first, second = state["tickets"]
    assert status == 200 and (state["waiting"], state["judged"], state["skipped"], state["last"]) == (2, 0, 0, None)
    assert first["prompt"] == "<b>a seven</b>" and len(second["candidates"]) == 4
    status, state = ask("/answer?by=pick", {"id": second["id"], "choice": 3})
    assert status == 200 and (state["waiting"], state["judged"], state["last"]["id"]) == (1, 1, second["id"])
    assert {p.winner for p in preferences.read(folder).pairs} == {f"images/{second['candidates'][3]}.png"}
    status, state = ask("/answer?by=pick", {"id": first["id"], "choice": "skip"})
    assert (state["waiting"], state["judged"], state["skipped"], state["last"]["skipped"]) == (0, 1, 1, True)
    assert ask("/take_back?by=pick", {"id": first["id"]})[1]["waiting"] == 1
    assert ask("/tickets")[1]["waiting"] == 0


def test_a_second_answer_is_refused_with_the_desk(ask):
    id = ask("/tickets?by=pick")[1]["tickets"][0]["id"]
    assert ask("/answer?by=pick", {"id": id, "choice": 0})[0] == 200
    assert ask("/answer?by=pick", {"id": id, "choice": 0})[0] == 200
    status, state = ask("/answer?by=pick", {"id": id, "choice": 1})
    assert status == 409 and "answered already: candidate 1" in state["error"] and state["waiting"] == 1
    status, state = ask("/take_back?by=pick", {"id": state["tickets"][0]["id"]})
    assert status == 409 and "no answer" in state["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "no JSON object"),
        (b"[" * 4000, "no JSON object"),
        (b"\xff", "no JSON object"),
        ([1], "no JSON object"),
        ({"id": "x"}, "must be an object with id and choice"),
        ({"id": "x", "choice": 0, "by": "you"}, "must be an object with id and choice"),
        ({"id": "x", "choice": 0}, "no ticket"),
        ({"id": ["x"], "choice": 0}, "no ticket"),
        ({"id": "x" * 5000, "choice": 0}, "no ticket"),
    ],
)
def test_a_body_that_says_nothing_is_refused(ask, folder, body, message):
    headers = {"Content-Type": "application/json"} if isinstance(body, bytes) else None
    status, said = ask("/answer?by=pick", body, headers)
    assert status == 400 and message in said["error"], said
    assert not (folder / preferences.PAIRS).exists()


def test_a_choice_that_is_none_is_refused(ask, folder):
    id = ask("/tickets?by=pick")[1]["tickets"][0]["id"]
    for choice in (2, -1, True, None, "best", [0], 0.5):
        assert ask("/answer?by=pick", {"id": id, "choice": choice})[0] == 400
    assert not (folder / preferences.PAIRS).exists()


def test_another_site_is_refused(ask, folder):
    """A form of another site has its address, and not this content type."""
    id = ask("/tickets?by=pick")[1]["tickets"][0]["id"]
    body = json.dumps({"id": id, "choice": 0}).encode()
    json_type = {"Content-Type": "application/json"}
    assert ask("/answer?by=pick", body, json_type | {"Origin": "https://example.org"})[0] == 403
    assert ask("/tickets?by=pick", headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask("/answer?by=pick", body, {"Content-Type": kind})[0] == 415
    assert not (folder / preferences.PAIRS).exists()


def test_pictures_are_pictures(served, folder):
    name = next((folder / "images").glob("*.png"))
    (folder / "images" / f"{'a' * 32}.png").write_text("<script>alert(1)</script>")

    async def what(client):
        for stem, content in ((name.stem, name.read_bytes()), ("a" * 32, b"<script>alert(1)</script>")):
            answer = await client.get(f"{URL}/images/{stem}")
            assert answer.status == 200 and answer.headers["Content-Type"] == "image/png"
            assert answer.headers["X-Content-Type-Options"] == "nosniff" and "sandbox" in str(answer.headers)
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "immutable" in answer.headers["Cache-Control"]
            assert await answer.read() == content

    served(what)


def test_nothing_outside_the_set_is_read(served, folder):
    secret = folder.parent.parent / "secret.png"
    secret.write_bytes(b"secret")
    (folder / "images" / f"{'b' * 32}.png").symlink_to(secret)
    (folder.parent / "link").symlink_to(folder.parent.parent)

    async def what(client):
        for path in (
            f"{URL}/images/{'b' * 32}", f"{URL}/images/..%2f..%2f..%2fsecret", f"{URL}/images/{'0' * 32}",
            f"{URL}/images/pairs.jsonl", f"{URL}/images/{'B' * 32}", "/retort/picker/..%2f/images/" + "b" * 32,
            "/retort/picker/..%2ftaste/tickets", "/retort/picker/.hidden/tickets", "/retort/picker/a%00b/tickets",
            "/retort/picker/%2fetc/tickets", "/retort/picker/" + "x" * 300 + "/tickets", "/retort/picker/link/tickets",
        ):  # fmt: skip
            answer = await client.get(path)
            assert answer.status in (400, 404), path
            assert b"secret" not in await answer.read()
        answer = await client.get("/retort/picker/none/tickets")
        assert (await answer.json())["waiting"] == 0
        body = {"id": "0" * 32, "choice": 0}
        assert (await client.post("/retort/picker/none/answer", json=body)).status == 400

    served(what)
    assert not (folder.parent / "none").exists()


def test_who_picks_has_a_length(ask):
    assert ask("/tickets?by=" + "x" * 201)[0] == 400


def test_a_held_or_full_disk_is_told_and_may_be_tried_again(ask, folder, monkeypatch):
    id = ask("/tickets?by=pick")[1]["tickets"][0]["id"]
    monkeypatch.setattr(tickets, "PATIENCE", 0.05)
    with locked(folder, tickets.LOCK):
        assert ask("/answer?by=pick", {"id": id, "choice": 0})[0] == 503
    monkeypatch.setattr(tickets, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    status, said = ask("/answer?by=pick", {"id": id, "choice": 0})
    assert status == 500 and "No space left" in said["error"]
    monkeypatch.undo()
    assert ask("/answer?by=pick", {"id": id, "choice": 0})[0] == 200
