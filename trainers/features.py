"""What a discriminator sees of a network: outputs of its blocks, as one row for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .entries import Around, surround, uncover

# Sides of a transformer's patches: how many tokens a latent makes.
PATCHES = (1, 2, 4)


def of(output: Any, x: Tensor) -> Tensor | None:
    """The picture's part of what a block returns for latents x (B, ...): (B, tokens, C) or (B, C, ...).

    None where no part has a row for each sample, such as a block that takes patches for samples.
    """
    counts = {math.prod([*x.shape[2:-2], *(-(-side // patch) for side in x.shape[-2:])]) for patch in PATCHES}
    alone = len(x) == 1 and x.ndim == 3 and x.shape[1] == 1  # parts in one row, whose tokens nobody counts here
    parts = [part for part in (output if isinstance(output, tuple | list) else (output,)) if isinstance(part, Tensor)]
    # Tokens of a whole batch in one row, sample after sample (SeedVR2), or of the one sample (MiniMax-H3).
    rows = [
        part.view(len(x), -1, part.shape[1])
        if part.ndim == 2 and len(part) % len(x) == 0 and (alone or len(part) // len(x) in counts)
        else part
        for part in parts
    ]
    rows = [part for part in rows if part.ndim >= 3 and len(part) == len(x)]
    # A block of a joint transformer returns text and image. At few pixels the text is the longer, so that the
    # count of tokens tells first; else the image is the larger, or comes last.
    image = [part for part in rows if part.ndim > 3 or part.shape[1] in counts]
    return max(reversed(image or rows), key=Tensor.numel, default=None)


class _Watched(Around):
    """An entry of a block whose output is looked at."""

    def __init__(self, forward: Callable[..., Any], inside: list[bool], look: Callable[[Any], None]):
        super().__init__(forward, inside)
        self._look = look

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See the base."""
        output = self.within(*args, **kwargs)
        self._look(output)
        return output


@contextmanager
def watching(modules: Sequence[nn.Module], look: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Within it `look` is shown each of these blocks with its output, whichever way it is called."""
    for module in modules:
        surround(module, partial(_Watched, look=partial(look, module)))
    try:
        yield
    finally:
        for module in modules:
            uncover(module, _Watched)
