"""Texts and files from strangers: strict JSON, no orders to a terminal, names that fit, kinds of tensors."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file

from retort.files.atomic import checked_name, write_new
from retort.files.log_file import read_rows
from retort.files.strangers import MOST_BYTES, parse, plain, read_json
from retort.preferences import exchange as preference_files
from retort.preferences import store as preferences
from retort.preferences.tickets import Ticket
from retort.trainers import state
from retort.trainers.dataset import Dataset
from retort.trainers.export import read_lora
from retort.trainers.job import DATA
from retort.trainers.origin import ORIGIN, recognise
from retort.trainers.watch import Metrics, open_picture, read_metrics

BAD = {
    "": "no JSON",
    "{": "no JSON",
    '{"a": NaN}': "NaN is no number",
    '{"a": 1e999}': "too large",
    '{"a": 18446744073709551616}': "too large",
    '{"a": ' + "9" * 5000 + "}": "too large",
    '{"name": 1, "name": 2}': "given twice",
    "[" * 100_000: "nested too deep",
    "[" * 33 + "]" * 33: "nested too deep",
    '{"a":' * 33 + "1" + "}" * 33: "nested too deep",
    r'{"a": "\ud800"}': "half a character",
    r'{"\udfff": 1}': "half a character",
    '"' + "x" * MOST_BYTES + '"': "larger than",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "theirs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"theirs\.json: .*{message}"):
        read_json(path)
    with pytest.raises(ValueError, match=r"theirs\.json: .*UTF-8"):
        path.write_bytes(b"{\xe9}")
        read_json(path)


def test_plain_json_is_read_as_it_is():
    value = {"a": [1, -2.5, True, None, "\u00e9\U0001f600"], "b": {"c": {"d": 2**64 - 1}}}
    assert parse(json.dumps(value).encode()) == value == parse(json.dumps(value, ensure_ascii=False).encode())
    assert parse(b"[" * 32 + b"]" * 32)
    assert parse(b'{"a": Infinity}', finite=False) == {"a": math.inf}


def test_many_names_are_looked_at_once(slowness):
    text = json.dumps({str(i): i for i in range(60_000)})
    began = time.process_time()
    with pytest.raises(ValueError, match="given twice"):
        parse((text[:-1] + ', "59999": 1}').encode())
    assert time.process_time() - began < 2 * slowness


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;pwned\x07title", "title"), ("\x1b[2J\x1b[31mred\x1b[0m", "red"), ("\x9b2Jx", "x"),
        ("\x1bP1$r\x1b\\x", "x"), ("\x1b]52;c;ZXZpbA==\x1b\\x", "x"), ("a\x07\x08b", r"a\x07\x08b"),
        ("one\r\ntwo\nthree\tfour", "one\ntwo\nthree\tfour"), ("\u202egnp", r"\u202egnp"), ("\ud800", r"\ud800"),
        ("\x1b", r"\x1b"), ("\x1b]0;no end", ""),
        ("step 3, caf\u00e9 \U0001f600 \u4e2d", "step 3, caf\u00e9 \U0001f600 \u4e2d"),
    ],
)  # fmt: skip
def test_no_order_reaches_a_terminal(text, shown):
    assert plain(text) == shown and plain(shown) == shown
    plain(text).encode()


def test_names_are_counted_in_bytes(tmp_path):
    for name in ("\U0001f600" * 100, "\u4e2d" * 100, "x" * 121):
        with pytest.raises(ValueError, match="cannot be a file's name: it is longer"):
            checked_name(name)
    for name in ("con", "NUL", "aux.txt", "COM1", "lpt9.safetensors", "Con .x", "com\u00b9"):
        with pytest.raises(ValueError, match="Windows keeps it"):
            checked_name(name)
    for name in ("console", "com10", "\u4e2d" * 70, "\U0001f600" * 57):
        assert checked_name(name) == name
        assert write_new(tmp_path, name, b"x").name == f"{name}.safetensors"
        assert write_new(tmp_path, name, b"x").name == f"{name}_2.safetensors"
    for name in ("a\ud800", "a\x1b[2J", "a\x85b"):
        with pytest.raises(ValueError, match="cannot be a file's name"):
            checked_name(name)


LINES = ["[" * 100_000, '{"step": 2, "student_loss": ' + "9" * 5000 + "}",
         '{"step": 2, "student_loss": ' + "9" * 400 + "}",
         '{"step": 2, "a": [[[1]]], "student_loss": {}}', '{"step": "2"}', '{"step": -1}', "[1]", "\ufeff{}",
         '{"step": 1e400}',
         '{"step": true}', '{"step": 99999999999999999999}']  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_strangers_log_is_read_and_gone_on_with(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "student_loss": 1.5}}\n{line}\n{{"step": 3, "student_loss": 2.5}}\n')
    assert [row.get("student_loss") for row in read_rows(path) if row["step"] != 2] == [1.5, 2.5]
    from retort.trainers.chart import draw

    draw(read_metrics(path))
    log = Metrics(tmp_path, 3)
    log.add(4, {"student_loss": 3.5})
    log.close()
    assert [row["step"] for row in read_metrics(path) if row["step"] != 2] == [1, 3, 4]


ORIGINS = ["[]", "null", "3", '"a"', '{"model": 3, "prompts": 5, "negative": {}}', "[" * 100_000,
           '{"prompts": ' + "[" * 900 + "]" * 900 + "}",
           '{"prompts": [[[1, 2], 0.5, [0.1, "x", 0.2, 0.3]]]}', '{"prompts": [[[1, 2], 0.5, [0.1]]]}',
           "\ud7ff{"]  # fmt: skip


@pytest.mark.parametrize("text", ORIGINS, ids=range(len(ORIGINS)))
def test_a_damaged_origin_is_one_message(tmp_path, text):
    (tmp_path / ORIGIN).write_text(text, encoding="utf-8")
    now = {"model": "a", "prompts": [[[1, 2], 0.5, [0.1, 0.2, 0.2, 0.3]]], "negative": None}
    with pytest.raises(ValueError, match="another name"):
        recognise(tmp_path, now, True)


def test_an_origin_may_be_infinitely_certain(tmp_path):
    now = {"strengths": [math.inf, 1.0]}
    recognise(tmp_path, now, False)
    recognise(tmp_path, now, True)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_kinds_of_tensors_that_no_file_of_ours_has_are_named(tmp_path, kind):
    tensor = torch.ones(2, 2).to(kind)
    metadata = {"retort_state": "1", "config": "{}", "counters": '{"done": 1, "position": 1}'}
    save_file({"average/a": tensor}, tmp_path / "state.safetensors", metadata)
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged .*'average/a' is of torch\..*another name"):
        state.load(tmp_path / "state.safetensors", None)
    save_file({"entry/0/tokens": tensor}, tmp_path / DATA, {"retort_dataset": "1", "header": "{}"})
    with pytest.raises(ValueError, match=r"data\.safetensors is damaged .*is of torch\..*write the job anew"):
        Dataset.load(tmp_path / DATA)
    save_file({"a.lora_up.weight": tensor}, tmp_path / "lora.safetensors")
    if kind is torch.complex64:
        with pytest.raises(ValueError, match=r"lora\.safetensors holds 'a\.lora_up\.weight' of torch\.complex64"):
            read_lora(tmp_path / "lora.safetensors")
    else:  # there are LoRAs in float8
        assert read_lora(tmp_path / "lora.safetensors")["a.lora_up.weight"].dtype == kind
    if kind is not torch.complex64:
        save_file({"latent": torch.ones(4, 2, 2).to(kind)}, tmp_path / "l.safetensors")
        assert torch.equal(preferences.load_latent(tmp_path / "l.safetensors"), torch.ones(4, 2, 2))


def test_half_a_character_spoils_its_own_line_only(tmp_path):
    names = [preferences.keep_image(tmp_path, torch.full((4, 4, 3), value)) for value in (0.1, 0.9)]
    rows = [{"prompt": prompt, "winner": names[0], "loser": names[1]} for prompt in ("a", "\ud800", "b")]
    (tmp_path / preferences.PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = preferences.read(tmp_path)
    assert [p.prompt for p in found.pairs] == ["a", "b"] and "half a character" in found.problems[0]
    found.split(0.5, 0)
    with pytest.raises(ValueError, match="half a character"):
        preferences.append(tmp_path, rows[1:2])
    with pytest.raises(ValueError, match="prompt holds half a character"):
        Ticket("\ud800", ("images/" + "0" * 32 + ".png", "images/" + "1" * 32 + ".png"))


def test_a_parquet_row_that_is_no_text_is_named(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import io

    from pyarrow import parquet

    pictures = []
    for value in (0.1, 0.9):
        name = preferences.keep_image(tmp_path / "made", torch.full((4, 4, 3), value))
        pictures.append((tmp_path / "made" / name).read_bytes())
    captions = arrow.array([b"a seven", b"\xff\xfe", b"a three"], arrow.binary()).view(arrow.string())
    table = arrow.table({
        "caption": captions, "jpg_0": [pictures[0]] * 3, "jpg_1": [pictures[1]] * 3, "label_0": [1.0, 1.0, 0.0],
    })  # fmt: skip
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    (tmp_path / "theirs.parquet").write_bytes(buffer.getvalue())
    count, problems = preference_files.take_in(tmp_path / "theirs.parquet", tmp_path / "set", "x")
    assert count == 2 and problems == ["row 2: a text in it is not in UTF-8"]


def test_a_preview_that_is_no_picture_is_named(tmp_path):
    from retort.files.folder import inside

    (tmp_path / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"the picture .*a\.png cannot be read"):
        open_picture(inside(tmp_path) / "a.png")
