"""Core's conditioning nodes."""

from __future__ import annotations

import torch

from ...files.errors import UsageError
from ...hosts.headless.model import Clip, Conditioning
from ..api import io
from .declare import core_node


@core_node(
    display_name="CLIP Text Encode (Prompt)",
    category="model/conditioning",
    inputs=[
        io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
        io.Clip.Input("clip"),
    ],
    outputs=[io.Conditioning.Output()],
)
def CLIPTextEncode(text: str, clip: Clip | None):
    """A prompt as CONDITIONING; (words:1.2) weighs them."""
    if clip is None:
        raise UsageError(
            "the checkpoint that this CLIP comes from holds no text encoder; for the embedded model connect the "
            "CLIP of RetortEmbeddedModel, otherwise load a checkpoint that has one"
        )
    return io.NodeOutput(clip.encode(text))


@core_node(
    category="model/conditioning/transform",
    inputs=[io.Conditioning.Input("conditioning")],
    outputs=[io.Conditioning.Output()],
)
def ConditioningZeroOut(conditioning: Conditioning):
    """The same CONDITIONING with every number zero."""
    out = []
    for tokens, extra in conditioning:
        pooled = extra.get("pooled_output")
        zeroed = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
        out.append([torch.zeros_like(tokens), {**extra, **zeroed}])
    return io.NodeOutput(out)


@core_node(
    display_name="Conditioning (Combine)",
    category="model/conditioning/transform",
    inputs=[io.Conditioning.Input("conditioning_1"), io.Conditioning.Input("conditioning_2")],
    outputs=[io.Conditioning.Output()],
)
def ConditioningCombine(conditioning_1: Conditioning, conditioning_2: Conditioning):
    """Both conditions; the model's answers to them are averaged."""
    return io.NodeOutput(conditioning_1 + conditioning_2)


@core_node(
    category="model/conditioning/flux",
    inputs=[
        io.Conditioning.Input("conditioning"),
        io.Float.Input("guidance", default=3.5, min=0.0, max=100.0, step=0.1),
    ],
    outputs=[io.Conditioning.Output()],
)
def FluxGuidance(conditioning: Conditioning, guidance: float):
    """The guidance that a Flux dev model is told."""
    return io.NodeOutput([[tokens, {**extra, "guidance": guidance}] for tokens, extra in conditioning])


NODES = [CLIPTextEncode, ConditioningZeroOut, ConditioningCombine, FluxGuidance]
