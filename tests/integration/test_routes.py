"""Every route of ours on a running server: what its own page gets, and what others, forgers and floods meet there."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib
import json
import re
from urllib.parse import quote, urlsplit

import pytest
import torch

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SECRET = "what nobody may read"
SEARCH = "20260101-000000-00000000"
BODIES = {
    "command": {"command": "stop"}, "take": {"item": 0, "number": 1}, "take_out": {"line": 1}, "put_back": {"line": 1},
    "caption": {"name": "a.png", "caption": "a cat", "before": ""},
}  # fmt: skip
# What may be any text.
FREE = {"caption": ("caption", "before")}
# What is done with a run that has ended, each to a run of its own.
ENDED = re.compile(r"(/api)?/retort/runs/\{run\}/(delete|rename|export)")
# Paths that leave a folder, spelled in the ways that a server might take apart.
ELSEWHERE = (
    "..", "%2e%2e", "%2e", "..%2f..%2fsecret", "%2e%2e%2f%2e%2e%2fsecret", "%2fetc%2fpasswd", "..%5c..%5csecret",
    "C:%5csecret", "secret%00.png", "link", "%252e%252e%252fsecret", "x" * 4000, quote("<img src=x onerror=alert(1)>"),
)  # fmt: skip


@pytest.fixture(scope="module")
def routes(server):
    """Every (method, path) of ours, as the server's own router lists them."""
    found = {tuple(one) for one in json.loads(server.get("/every_route"))}
    ours = sorted((method, path) for method, path in found if path.startswith(("/retort", "/api/retort")))
    assert {path.startswith("/api") for _, path in ours} == {True, False} and len(ours) >= 28
    return ours


@pytest.fixture(scope="module")
def known(server):
    """Something behind every route, a secret beside it, and links to the secret; what to put into the routes' names."""
    preferences, tickets, job_watch = (
        importlib.import_module(f"retort.{name}")
        for name in ("preferences.store", "preferences.tickets", "trainers.job_watch")
    )
    output, records = server.base / "output", server.base / "output" / "retort_searches" / "records"
    run = output / "retort" / "known"
    (run / "previews").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "student_loss": 2}\n')
    (run / "previews" / "step_0000001.png").write_bytes(b"\x89PNG")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_0000001.safetensors").write_bytes(b"known")
    job_watch.write_status(run, job_watch.Status("running", 1, 9, machine="another"))
    for name in ("delete", "rename", "export"):
        for begin in ("api_", "own_"):
            job_watch.write_status(output / "retort" / (begin + name), job_watch.Status("finished", 9, 9))
    kept = records / SEARCH / "item_0"
    kept.mkdir(parents=True)
    view = {"pid": 0, "going": False, "prompt": SECRET[::-1], "reward": "mean", "items": [None]}
    (kept.parent / "view.json").write_text(json.dumps(view))
    for ending in ("jpg", "latent"):
        (kept / f"1.{ending}").write_bytes(b"known")
    sets = output / "retort_preferences"
    names = [preferences.keep_image(sets / "known", torch.full((8, 8, 3), value)) for value in (0.2, 0.8)]
    tickets.ask(sets / "known", [tickets.Ticket("a seven", tuple(names), by="pick")])
    preferences.append(sets / "known", [{"prompt": "a", "winner": names[0], "loser": names[1], "by": "known"}])
    secret = server.base / "secret"
    (secret / "images").mkdir(parents=True)
    for name in ("secret", "metrics.jsonl", "pairs.jsonl", "tickets.jsonl", "view.json", "status.json", "secret.png"):
        (secret / name).write_text(json.dumps({"step": 1, "prompt": SECRET}) + "\n")
    for folder in (output / "retort", sets, records):
        (folder / "link").symlink_to(secret)
    pictures = server.base / "input" / "known"
    pictures.mkdir(parents=True)
    (pictures / "a.png").write_bytes((sets / "known" / names[0]).read_bytes())
    # A link in the input folder itself would be the user's own.
    (pictures / "link").symlink_to(secret)
    (pictures / "link.png").symlink_to(secret / "secret.png")
    picture = names[0].split("/")[1].removesuffix(".png")
    (ticket,) = tickets.TicketState(sets / "known", "pick").waiting
    bodies = BODIES | {"answer": {"id": ticket.id, "choice": "skip"}, "take_back": {"id": ticket.id}}
    places = {"run": "known", "search": SEARCH, "item": "0", "number": "1", "name": "known", "set": "known",
              "folder": "known", "page": "training",
              "image": picture, "picture": "step_0000001.png"}  # fmt: skip
    return places, bodies


def address(path: str, places: dict[str, str]) -> str:
    if places["run"] == "known":
        places = places | {"run": ended(path) or "known"}
    filled = re.sub(r"\{(\w+)\}", lambda match: places[match[1]], path)
    return filled + ("?by=pick" if "/picker/" in filled and "/images/" not in filled else "")


def ended(path: str) -> str:
    """The run that has ended and that a route works on, "" for the other routes."""
    found = ENDED.match(path)
    return f"{'api' if found[1] else 'own'}_{found[2]}" if found else ""


def ask(server, method, path, body=None, headers=None) -> tuple[int, str]:
    """Sent as spelled: urllib would refuse some of it."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    try:
        connection.putrequest(method, path)
        kind = {} if data is None else {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (kind | (headers or {})).items():
            connection.putheader(name, value)
        connection.endheaders()
        # Whoever is refused early finds the line closed.
        with contextlib.suppress(ConnectionError):
            connection.send(data or b"")
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def marks(server) -> dict[str, str]:
    """What the folders hold."""
    folders = [server.base / name for name in ("output", "input", "temp")]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    contents = {path: path.read_bytes() for path in files if not path.name.endswith("lock")}
    return {str(path): hashlib.sha256(content).hexdigest() for path, content in contents.items()}


def body_of(method, path, bodies):
    if ended(path):
        return {"name": ended(path).replace("rename", "renamed")} if method == "POST" else None
    if path.endswith("/keep"):  # under a name that nothing has yet
        return {"step": 1, "name": f"kept by {'api' if path.startswith('/api') else 'own'}"}
    return bodies[path.rsplit("/", 1)[1]] if method == "POST" else None


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://example.org"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
     {"Sec-Fetch-Site": "cross-site", "Origin": "https://example.org", "X-Retort-Picker": "1"}],
    ids=lambda headers: " ".join(headers.values()),
)  # fmt: skip
def test_another_sites_page_is_refused(server, routes, known, headers):
    places, bodies = known
    before = marks(server)
    for method, path in routes:
        status, text = ask(server, method, address(path, places), body_of(method, path, bodies), headers)
        # A link to the phone's page may stand anywhere: it shows nothing by itself.
        allowed = (200, 403) if path.endswith("/retort/pick") else (403,)
        assert status in allowed and "known" not in text, (method, path, status, text)
    assert marks(server) == before


@pytest.mark.parametrize("elsewhere", ELSEWHERE, ids=range(len(ELSEWHERE)))
def test_nothing_outside_is_reached(server, routes, known, elsewhere):
    places, bodies = known
    before = marks(server)
    for method, path in routes:
        for name in re.findall(r"\{(\w+)\}", path):
            where = address(path, places | {name: elsewhere})
            status, text = ask(server, method, where, body_of(method, path, bodies))
            # A run that is not there has an empty log and came from nowhere, a set has no tickets.
            bare = path.endswith(("/log", "/graph"))
            empty = status == 200 and (text == "{}" if bare else json.loads(text).get("waiting") == 0)
            assert status in (400, 403, 404, 405) or empty, (method, where, status, text)
            assert SECRET not in text and "root:" not in text, (where, text)
    assert marks(server) == before


def test_a_body_that_is_something_else_is_refused(server, routes, known):
    places, bodies = known
    before = marks(server)
    texts = (b"", b"{", b"\xff\xfe", b"[" * 60_000, b'{"a":' * 9000 + b"1" + b"}" * 9000, b"1e999", b"{}")
    wrong = (
        *texts, b"[1]", b'"stop"', b"null",
        {"command": 5}, {"command": ["stop"]}, {"command": {"stop": 1}}, {"command": "stop\x00"},
        {"command": "../stop"},
        {"item": -1, "number": 1}, {"item": [0], "number": {}}, {"item": "../0", "number": "1"},
        {"item": 10**30, "number": 0}, {"item": True, "number": None}, {"id": 5, "choice": 0},
        {"id": ["x"], "choice": 0}, {"id": {"x": 1}}, {"id": None}, {"id": "0" * 32, "choice": 0},
        {"id": "x\x00", "choice": "tie"},
    )  # fmt: skip
    posts = [path for method, path in routes if method == "POST"]
    assert len(posts) >= 8
    for path in posts:
        right = body_of("POST", path, bodies)
        free = FREE.get(path.rsplit("/", 1)[1], ())
        values = (True, None, 1.5, [0], {"x": 0}, "é" * 5000, "")
        forged = [right | {key: value} for key in right for value in values[: 5 if key in free else None]]
        for body in (*wrong, *forged):
            status, text = ask(server, "POST", address(path, places), body)
            assert status == 400 and "error" in json.loads(text), (path, body, status, text)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json5"):
            assert ask(server, "POST", address(path, places), right, {"Content-Type": kind})[0] == 415
    assert marks(server) == before


def test_a_flood_is_refused(server, routes, known):
    places, _ = known
    before = marks(server)
    for method, path in routes:
        if method == "POST":
            assert ask(server, method, address(path, places), b"[" * 100_000_000)[0] == 413
    assert marks(server) == before


def test_no_other_method_does_anything(server, routes, known):
    places, bodies = known
    before = marks(server)
    for method, path in routes:
        for other in {"GET", "POST", "PUT", "DELETE", "PATCH"} - {method}:
            assert ask(server, other, address(path, places), bodies.get("take_back"))[0] in (404, 405)
    assert marks(server) == before


def test_its_own_page_is_answered(server, routes, known):
    """Last, for it moves things: every request that was refused above is granted where nothing is wrong with it."""
    places, bodies = known
    answers = {}
    # An answer comes before it is taken back.
    for method, path in sorted(routes, key=lambda one: (one[0], one[1])):
        headers = {"Sec-Fetch-Site": "same-origin", "Origin": server.url}
        answers[method, path] = ask(server, method, address(path, places), body_of(method, path, bodies), headers)
    assert not {key: said for key, said in answers.items() if said[0] != 200}
    assert (server.base / "input" / f"retort_{SEARCH}_0_1.latent").is_file()
    assert (server.base / "output" / "retort" / "known" / "commands" / "stop").exists()
