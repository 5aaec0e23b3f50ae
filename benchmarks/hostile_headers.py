"""Twenty-four ways in which a request may say where it comes from, and which of them are the server's own page."""

from __future__ import annotations

Headers = dict[str, str]
EVIL = "evil.example"


def sets(host: str) -> dict[str, tuple[Headers, bool]]:
    """{name: (headers, whether they may pass)} for a server whose address is `host`, as in 127.0.0.1:8188."""
    port = host.rsplit(":", 1)[1]
    own, site = f"http://{host}", "Sec-Fetch-Site"
    there, rebound = f"http://{EVIL}", f"{EVIL}:{port}"
    return {
        # The page itself, by the names that it can have; and programs, which send neither header.
        "a program": ({}, True),
        "own page": ({site: "same-origin"}, True),
        "own page, posting": ({site: "same-origin", "Origin": own}, True),
        "own page of an old browser": ({"Origin": own}, True),
        "typed address": ({site: "none"}, True),
        "localhost": ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}", site: "same-origin"}, True),
        "address in capitals": ({"Host": f"LOCALHOST:{port}", "Origin": f"http://localhost:{port}"}, True),
        "another address": ({"Host": "192.0.2.7:80", "Origin": "http://192.0.2.7:80"}, True),
        "IPv6": ({"Host": f"[::1]:{port}", "Origin": f"http://[::1]:{port}", site: "same-origin"}, True),
        # Pages of others.
        "another site": ({"Origin": there}, False),
        "another site, told by the browser": ({"Origin": there, site: "cross-site"}, False),
        "an image of another site": ({site: "cross-site"}, False),
        "another port": ({"Origin": "http://127.0.0.1:1"}, False),
        "same site": ({site: "same-site"}, False),
        "no origin": ({"Origin": "null"}, False),
        "an origin that is none": ({"Origin": "http://["}, False),
        "another scheme": ({"Origin": f"file://{host}"}, False),
        "disagreeing": ({site: "same-origin", "Origin": there}, False),
        "a site that is none": ({site: "yes", "Origin": own}, False),
        # A stranger's name that leads here.
        "rebound": ({"Host": rebound, "Origin": f"http://{rebound}", site: "same-origin"}, False),
        "rebound, old browser": ({"Host": rebound, "Origin": f"http://{rebound}"}, False),
        "rebound, no origin": ({"Host": rebound}, False),
        "a name that looks like an address": ({"Host": f"127.0.0.1.{EVIL}:{port}", site: "same-origin"}, False),
        "a Host that is none": ({"Host": f"127.0.0.1:{port}@{EVIL}", site: "same-origin"}, False),
    }
