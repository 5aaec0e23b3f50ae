"""Stable Diffusion's UNet (SD1.5, SDXL): the latent-diffusion file layout and diffusers' UNet2DConditionModel."""

from __future__ import annotations

from typing import Any

from ...files.errors import UsageError
from .renames import Layout, count

Shapes = dict[str, tuple[int, ...]]
_RESNET = (
    ("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"), ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"),
)  # fmt: skip
_BLOCK = (
    *((f"attn{n}.{p}", f"attn{n}.{p}") for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")),
    *((p, p) for p in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")),
)
_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"),
)  # fmt: skip


def is_unet(shapes: Shapes) -> bool:
    """Whether the names are a UNet's in the latent-diffusion layout."""
    return "input_blocks.0.0.weight" in shapes and "out.2.weight" in shapes


def config(shapes: Shapes) -> dict[str, Any]:
    """UNet2DConditionModel's arguments, read from tensor shapes. UsageError for a UNet of another family.

    What shapes do not tell is the family's: SD1.5 has 8 heads everywhere, SDXL heads of 64.
    """
    channels_in = shapes["input_blocks.0.0.weight"][1]
    out_channels = shapes["out.2.weight"][0]
    if channels_in != 4 or out_channels != 4:
        raise UsageError(
            f"this UNet takes {channels_in} channels and gives {out_channels}: an inpainting or editing model, which "
            "needs ComfyUI; use a text-to-image checkpoint"
        )
    levels: list[list[tuple[int, int]]] = [[]]  # per level: (channels, attention depth) of each resnet
    for i in range(1, count(shapes, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            depth = count(shapes, f"input_blocks.{i}.1.transformer_blocks.")
            levels[-1].append((shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0], depth))
    middle = count(shapes, "middle_block.1.transformer_blocks.")
    cross = [s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")]
    regular = all(len(level) == len(levels[0]) and len(set(level)) == 1 for level in levels)
    depths = [level[0][1] if level else 0 for level in levels]
    if not regular or not middle or not cross or depths[-1] not in (0, middle):
        raise UsageError("this UNet is of a shape that the headless host does not know; run the workflow in ComfyUI")
    is_xl = "label_emb.0.0.weight" in shapes
    if not is_xl and cross[0] == 1024:
        raise UsageError("this is a Stable Diffusion 2 model, which needs ComfyUI; SD1.5, SDXL, SD3 and Flux run here")
    widths = [level[0][0] for level in levels]
    attends = ["CrossAttn" if depth else "" for depth in depths]
    made: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": [f"{a}DownBlock2D" for a in attends],
        "up_block_types": [f"{a}UpBlock2D" for a in attends[::-1]],
        # The middle takes its depth from the last entry.
        "transformer_layers_per_block": [*(max(d, 1) for d in depths[:-1]), middle],
        "cross_attention_dim": cross[0],
        "attention_head_dim": [w // 64 for w in widths] if is_xl else 8,
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }
    if is_xl:
        made |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return made


def layout(config: Any) -> Layout:
    """The table for a UNet2DConditionModel's config (a dict, or the model's own `config`)."""
    table = Layout()
    table.add_all("", "", _ENDS)
    per, levels = config["layers_per_block"], len(config["block_out_channels"])
    depths = config["transformer_layers_per_block"]
    depths = [depths] * levels if isinstance(depths, int) else list(depths)

    def resnet(original: str, diffusers: str) -> None:
        table.add_all(f"{original}.", f"{diffusers}.", _RESNET)

    def attention(original: str, diffusers: str, depth: int) -> None:
        table.add_all(f"{original}.", f"{diffusers}.", ((p, p) for p in ("norm", "proj_in", "proj_out")))
        for i in range(depth):
            block = f"transformer_blocks.{i}."
            table.add_all(f"{original}.{block}", f"{diffusers}.{block}", _BLOCK)

    for b in range(levels):
        attends = config["down_block_types"][b].startswith("CrossAttn")
        for j in range(per):
            i = 1 + b * (per + 1) + j
            resnet(f"input_blocks.{i}.0", f"down_blocks.{b}.resnets.{j}")
            if attends:
                attention(f"input_blocks.{i}.1", f"down_blocks.{b}.attentions.{j}", depths[b])
        table.add(f"input_blocks.{(b + 1) * (per + 1)}.0.op", f"down_blocks.{b}.downsamplers.0.conv")
        attends = config["up_block_types"][b].startswith("CrossAttn")
        for j in range(per + 1):
            i = b * (per + 1) + j
            resnet(f"output_blocks.{i}.0", f"up_blocks.{b}.resnets.{j}")
            if attends:
                attention(f"output_blocks.{i}.1", f"up_blocks.{b}.attentions.{j}", depths[levels - 1 - b])
        # The upsampler stands behind the attention, or in its place.
        table.add(f"output_blocks.{i}.{2 if attends else 1}.conv", f"up_blocks.{b}.upsamplers.0.conv")
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0", depths[-1])
    resnet("middle_block.2", "mid_block.resnets.1")
    return table
