"""What autograd keeps, for tests: they load this file by its path, since tests are no package."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Within it, `count` adds up what autograd keeps for backward, each storage once, apart from weights."""

    def __init__(self, network: nn.Module):
        self.count = 0
        weights = [t for t in (*network.parameters(), *network.buffers()) if not t.is_meta]
        seen = {part.untyped_storage().data_ptr() for tensor in weights for part in parts(tensor)}

        def pack(tensor: Tensor) -> Tensor:
            for part in parts(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    self.count += storage.nbytes()
            # The tensor itself, where it is its own node's output, would be a cycle that nothing ever ends.
            return tensor.detach()

        super().__init__(pack, lambda tensor: tensor)
