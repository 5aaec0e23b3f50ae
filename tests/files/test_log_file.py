"""A run's log: what is a row, what is cut off, and how little of a long one is read."""

from __future__ import annotations

import json

import pytest

from retort.files import log_file
from retort.files.log_file import column, end_of, last_step, read_rows, thinned
from retort.trainers import watch
from retort.trainers.chart import draw

RUBBISH = (
    b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1e999}', b"\xff\xfe", b"[1]", b'{"step": true}',
    b'{"step": -1}', b'{"step": 1},{"step": 2}', b'{"a": 1}', b"{",
)  # fmt: skip


def line(step: int, **values) -> bytes:
    return json.dumps({"step": step, **values}).encode() + b"\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / log_file.METRICS


def written(path, count, between=b""):
    path.write_bytes(b"".join(line(i, student_loss=i / 2) + between for i in range(1, count + 1)))


def test_what_is_no_row_is_passed_over(path):
    path.write_bytes(line(1, student_loss=0.5) + b"\n".join(RUBBISH) + b"\n\n" + line(2, a=None, b="x", c=True, d=3))
    assert list(read_rows(path)) == [{"step": 1, "student_loss": 0.5}, {"step": 2, "d": 3}]
    huge = b'{"step": 3, "student_loss": %s, "b": NaN, "c": -Infinity, "d": 4}\n' % (b"9" * 400)
    path.write_bytes(huge)
    assert list(read_rows(path)) == [{"step": 3, "d": 4}] and column(path, "student_loss") == []
    assert draw(list(read_rows(path))).shape[0] == 1
    assert list(read_rows(path.with_name("none"))) == [] and last_step(path.with_name("none")) == 0


def test_lines_may_lie_across_blocks(path, monkeypatch):
    monkeypatch.setattr(log_file, "BLOCK", 64)
    path.write_bytes(line(1, a=1) + b"x" * 1000 + b"\n" + line(2, a=2) + line(3, a=3)[:-1])
    assert column(path, "a") == [1, 2, 3]


@pytest.mark.parametrize("block", [16, 64, 1 << 20])
def test_lines_of_a_lost_attempt_go(path, monkeypatch, block):
    monkeypatch.setattr(log_file, "BLOCK", block)
    whole = [line(i, student_loss=i) for i in range(1, 9)]
    for tail in (b"", b'{"step": 9, "stu', b"\n", b"[" * 300 + b"\n"):
        path.write_bytes(b"".join(whole) + tail)
        with open(path, "rb") as handle:
            for done in (1, 5, 8, 100):
                assert end_of(handle, done) == sum(map(len, whole[:done]))
            assert end_of(handle, 0) == 0
    metrics = watch.Metrics(path.parent, 5)
    metrics.add(6, {"student_loss": 60.0})
    metrics.close()
    assert column(path, "student_loss") == [1, 2, 3, 4, 5, 60.0]
    assert last_step(path) == 6


def test_of_a_long_log_a_little_is_read(path, monkeypatch):
    """Whatever its length, as many lines are taken apart, spread evenly; the first and the last are among them."""
    looked = []
    plain = log_file.row
    monkeypatch.setattr(log_file, "row", lambda data: looked.append(data) or plain(data))
    monkeypatch.setattr(log_file, "EXACT", 1000)
    for count in (2000, 20_000):
        written(path, count)
        looked.clear()
        rows, each = thinned(path, 100)
        assert len(looked) < 220 and 95 <= len(rows) <= 102
        assert rows[0]["step"] == 1 and rows[-1]["step"] == count
        assert each == pytest.approx(count / len(rows), rel=0.1)
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)) and max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 2 * each
    written(path, 20)
    assert thinned(path, 100)[1] == 1.0 and len(thinned(path, 5)[0]) == 20
    path.write_bytes(b"x" * 5000)
    assert thinned(path, 5)[0] == []
