"""The list of templates that the page asks for, on a server of its own."""

from __future__ import annotations

import asyncio

import pytest
import snapshots

pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from retort.hosts.comfyui import template_order  # noqa: E402

NAMES = sorted((path.stem for path in template_order.FOLDER.glob("*.json")), reverse=True)


@pytest.fixture
def sent():
    """sent(path, answer) -> what a server that answers so sends."""

    def one(path, answer):
        async def whole():
            app = web.Application()

            async def given(request):
                return answer if isinstance(answer, web.Response) else web.json_response(answer)

            app.router.add_get(path, given)
            template_order.listen(app)
            async with TestClient(TestServer(app)) as client:
                got = await client.get(path)
                return await got.json() if got.status == 200 else got.status

        return asyncio.run(whole())

    return one


@pytest.mark.parametrize("path", template_order.PATHS)
def test_numbers_come_first_and_what_needs_files_last(sent, path):
    others = {"another pack": ["z", "a"], "my retort": [*NAMES, "one of a user's"]}
    found = sent(path, others)
    assert found["another pack"] == ["z", "a"]
    names = found["my retort"]
    assert {*names} == {*NAMES, "one of a user's"} and names[-1] == "one of a user's"
    assert [name[:2] for name in names[:6]] == [f"{number} " for number in range(1, 7)]
    needy = snapshots.DOWNLOADS | snapshots.PUBLISHED | snapshots.TRAINED
    ours = names[6:-1]
    count = len([name for name in ours if name not in needy])
    assert not needy & {*ours[:count]} and ours == sorted(ours[:count]) + sorted(ours[count:])


def test_other_answers_stay(sent):
    assert sent("/other", {"retort": NAMES}) == {"retort": NAMES}
    assert sent(template_order.PATHS[0], {"retort": ["b", "a"]}) == {"retort": ["b", "a"]}
    assert sent(template_order.PATHS[0], web.Response(status=500)) == 500
