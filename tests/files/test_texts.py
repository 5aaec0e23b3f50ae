"""Texts as editors, web pages and word processors leave them."""

import pytest

from retort.files import texts
from retort.files.strangers import parse

TEXT = "a red zero\n\u4e00 caf\u00e9"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_encoding_of_unicode_is_read_without_its_mark(encoding):
    assert texts.decode(TEXT.encode(encoding)) == TEXT


def test_another_encoding_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no text in UTF-8 \(byte 3\); save it with the encoding UTF-8"):
        texts.decode("caf\u00e9 au lait".encode("cp1252"))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PK\x03\x04" + bytes(30), "a Word or OpenDocument file"), (b"{\\rtf1 a red seven}", "an RTF file"),
        (b"%PDF-1.7", "a PDF file"), (b"a red\0 seven" * 9, "zero bytes"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(data, kind):
    with pytest.raises(ValueError, match=kind):
        texts.decode(data)


def test_control_characters_are_no_words():
    # The end of a file of DOS, colours of a terminal, a picture's place; emoji of several and Hebrew stay whole.
    assert texts.prompts("a seven\n\x1a\n\x1b[1mbold\x7f\nan \ufffcimage\x08") == ["a seven", "[1mbold", "an image"]
    for kept in ("a\tb", "a \U0001f468\u200d\U0001f469 family", "\u05d0\u200f b", "\u201ca\u201d \u2014 b"):
        assert texts.prompts(kept) == [kept]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\u2029", "\v", "\x85"])
def test_lines_end_in_every_way(end):
    assert texts.prompts(f"a zero{end}{end}  a one {end}") == ["a zero", "a one"]
    assert texts.lines(f"a zero{end}{end}a one{end}") == ["a zero", "", "a one"]


def test_what_cannot_be_seen_is_left_out_and_odd_spaces_are_spaces():
    text = "\ufeffa\u00a0red\u2009zero\u200b\nsoft\u00adly\u3000\n\ufeff\u200b"
    assert texts.prompts(text) == ["a red zero", "softly"]
    # A family of emoji is one sign because of what joins it.
    kept = "\U0001f468\u200d\U0001f469 \u201cquoted\u201d"
    assert texts.clean(kept) == kept


def test_records_begin_with_a_mark_as_well():
    assert parse('{"caption": "a zero"}\r\n'.encode("utf-8-sig")) == {"caption": "a zero"}
    with pytest.raises(ValueError, match="no text in UTF-8"):
        parse(b'{"caption": "\xe9"}')
