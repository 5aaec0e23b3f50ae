"""Text files as people have them: one reader for prompts, captions, records and workflows."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What takes no room and is no part of a word: byte order marks inside a text that was joined from files, zero-width
# spaces and soft hyphens from web pages, the places of a word processor's pictures, and control characters such as the
# last one of files of DOS. The joiner of emoji (U+200D) and the marks of Arabic and Hebrew stay.
_INVISIBLE = re.compile("[\ufeff\u200b\u2060\u00ad\ufffc\x01-\x08\x0e-\x1b\x1f\x7f]")
# Documents that are taken for texts, by how they begin.
_DOCUMENTS = {b"PK\x03\x04": "a Word or OpenDocument file", b"{\\rtf": "an RTF file", b"%PDF": "a PDF file"}
# Spaces of web pages and word processors: no-break, thin, ideographic and others.
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# Ends of lines: of Windows and old Macs, soft breaks of word processors, and Unicode's own.
_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def decode(data: bytes) -> str:
    """Bytes of a text file as a text, without its byte order mark: UTF-8, or UTF-16 and UTF-32 where a mark says so.

    ValueError for anything else; the message says what the file is likely to be.
    """
    for start, kind in _DOCUMENTS.items():
        if data.startswith(start):
            raise ValueError(f"it is {kind} and no plain text; save it as plain text with the encoding UTF-8")
    name = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if name == "utf-8" and b"\0" in data[:4] and len(data) > 3:
        # Without a mark, but two bytes a character.
        name = "utf-16-le" if data[1] == 0 else "utf-16-be"
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is no text in UTF-8 (byte {error.start}); save it with the encoding UTF-8, which every editor offers"
        ) from error
    if "\0" in text:
        raise ValueError("it holds zero bytes, as no text does: it is damaged or of another kind; choose a text file")
    return text


def lines(text: str) -> list[str]:
    """The lines of a text, however they end, each as `clean` gives it; the empty ones too."""
    return [clean(line) for line in _ENDS.sub("\n", text).splitlines()]


def prompts(text: str) -> list[str]:
    """The prompts of a text with one in each line; lines that hold nothing are none."""
    return [line for line in lines(text) if line]


def captions(given: str | Sequence[str]) -> list[str]:
    """The prompts of one text, as `prompts` gives them, or of several texts, each a prompt: so captions arrive that a
    node reads from files. One that holds nothing is empty, unless none holds anything."""
    several = [given] if isinstance(given, str) else list(given)
    if len(several) == 1:
        return prompts(several[0])
    found = [" ".join(prompts(text)) for text in several]
    return found if any(found) else []


def clean(text: str) -> str:
    """A prompt without invisible characters and with plain spaces, stripped. Letters and punctuation stay."""
    return _SPACES.sub(" ", _INVISIBLE.sub("", text)).strip()
