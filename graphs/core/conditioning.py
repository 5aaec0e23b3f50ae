"""Core's conditioning nodes."""

from __future__ import annotations

import torch

from ...files.errors import UsageError
from ...hosts.headless.model import Clip, Conditioning
from ..api import io


class CLIPTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncode",
            display_name="CLIP Text Encode (Prompt)",
            category="model/conditioning",
            description="A prompt as CONDITIONING; (words:1.2) weighs them.",
            inputs=[
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
                io.Clip.Input("clip"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str, clip: Clip | None):
        if clip is None:
            raise UsageError(
                "the checkpoint that this CLIP comes from holds no text encoder; for the embedded model connect the "
                "CLIP of RetortEmbeddedModel, otherwise load a checkpoint that has one"
            )
        return io.NodeOutput(clip.encode(text))


class ConditioningZeroOut(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConditioningZeroOut",
            category="model/conditioning/transform",
            description="The same CONDITIONING with every number zero.",
            inputs=[io.Conditioning.Input("conditioning")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning):
        out = []
        for tokens, extra in conditioning:
            pooled = extra.get("pooled_output")
            zeroed = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
            out.append([torch.zeros_like(tokens), {**extra, **zeroed}])
        return io.NodeOutput(out)


class ConditioningCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConditioningCombine",
            display_name="Conditioning (Combine)",
            category="model/conditioning/transform",
            description="Both conditions; the model's answers to them are averaged.",
            inputs=[io.Conditioning.Input("conditioning_1"), io.Conditioning.Input("conditioning_2")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning_1: Conditioning, conditioning_2: Conditioning):
        return io.NodeOutput(conditioning_1 + conditioning_2)


class FluxGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FluxGuidance",
            category="model/conditioning/flux",
            description="The guidance that a Flux dev model is told.",
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.Float.Input("guidance", default=3.5, min=0.0, max=100.0, step=0.1),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, guidance: float):
        return io.NodeOutput([[tokens, {**extra, "guidance": guidance}] for tokens, extra in conditioning])


NODES = [CLIPTextEncode, ConditioningZeroOut, ConditioningCombine, FluxGuidance]
