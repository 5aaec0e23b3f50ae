"""What the command line prints: texts of strangers without orders to the terminal that shows them."""

from __future__ import annotations

import traceback
from typing import Any

from rich.console import Console

from ..files.strangers import plain


class Plain(Console):
    """A console on which no text is an order: colours and bars come from us alone."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, of plain texts."""
        super().print(*(plain(one) if isinstance(one, str) else one for one in objects), **options)

    def print_error(self) -> None:
        """Where the error that is handled now arose."""
        self.print(traceback.format_exc(), markup=False, highlight=False, style="dim")


def cell(text: str) -> str:
    """A text as a table or a bar takes it."""
    return plain(text).replace("[", "\\[")
