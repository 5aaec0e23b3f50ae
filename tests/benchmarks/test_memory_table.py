"""The committed table of counted peaks: no row may change by more than two in a hundred unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.benchmarks import memory_table  # noqa: E402
from retort.benchmarks.memory_table import GB, changed  # noqa: E402

DIFFUSERS = memory_table.rows("diffusers")


@pytest.mark.parametrize("row", DIFFUSERS, ids=str)
def test_a_peak_stays_what_it_was(row):
    """A change that is meant: `python -m retort.benchmarks.memory_table --write`, and say in the commit what grew."""
    kept = memory_table.read()[str(row)]["plain"]
    assert changed(kept, memory_table.count(row)) == []


def test_a_change_of_more_than_two_in_a_hundred_is_seen():
    kept = memory_table.read()[str(DIFFUSERS[0])]["plain"]
    assert changed(kept, replace(kept, state=kept.state + GB // 100)) == []
    found = changed(kept, replace(kept, state=kept.state + GB))
    assert len(found) == 2 and found[0].startswith("resident: ")


def test_tables_are_made_of_what_is_kept(tmp_path):
    kept = memory_table.read()
    lines = memory_table.table(kept).splitlines()
    counted = [row for row in memory_table.rows("comfyui") if str(row) in kept]
    assert len(lines) == 2 + len(counted)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert [line.split(" |")[0] for line in memory_table.cards(kept).splitlines()[2:]] == [
        f"| {card} GB" for card in memory_table.CARDS
    ]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- x -->\nb\n", encoding="utf-8")
    memory_table.put(page, "x", "new")
    assert page.read_text(encoding="utf-8") == "a\n<!-- x -->\n\nnew\n\n<!-- x -->\nb\n"
    page.write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="has not two marks"):
        memory_table.put(page, "x", "new")


def test_the_tables_in_the_documents_are_those():
    kept = memory_table.read()
    for path, text in (
        (memory_table.RESULTS, memory_table.table(kept)),
        (memory_table.TRAINING, memory_table.cards(kept)),
    ):
        assert text in path.read_text(encoding="utf-8")
