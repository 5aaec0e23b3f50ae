"""Tiny pipelines of every family, made with the config classes of diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def clip_tokenizer(folder: Path):
    """A byte-level CLIP tokenizer without merges: 512 letters and two ends."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters += [256 + i for i in range(256 - len(letters))]
    symbols = [chr(c) for c in letters]
    vocabulary = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    made = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    made.model_max_length = 77
    return made


def t5_tokenizer():
    """A character-level T5 tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    pieces += [(chr(c), -2.0) for c in range(33, 127)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=inner, extra_ids=0, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def clip_module(act: str, projected: bool):
    """A CLIP of two layers, one head of 64."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1,
        hidden_act=act, projection_dim=64, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_module(width: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=98, d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def vae(channels: int):
    from diffusers import AutoencoderKL

    quant = channels == 4
    return AutoencoderKL(
        block_out_channels=[32, 32, 64, 64], layers_per_block=1, latent_channels=channels, norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip


def unet(is_xl: bool):
    from diffusers import UNet2DConditionModel

    plain = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 8,
             "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 64}  # fmt: skip
    large = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": [1, 2],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 128,
        "transformer_layers_per_block": [1, 2], "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 64 + 6 * 256,
    }  # fmt: skip
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=[64, 128], layers_per_block=2, **(large if is_xl else plain)
    )


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=160, caption_projection_dim=128, pooled_projection_dim=128,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip


def flux(guidance: bool):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=guidance,
    )  # fmt: skip


def pipeline(kind: str, folder: Path):
    """A pipeline of kind SD1.5, SDXL, SD3, Flux dev or Flux schnell, saved in `folder`."""
    import diffusers as d

    torch.manual_seed(0)
    words = clip_tokenizer(folder.parent / f"{folder.name}-words")
    euler, flow = (
        d.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        d.FlowMatchEulerDiscreteScheduler(),
    )
    second = clip_tokenizer(folder.parent / f"{folder.name}-words2")
    second.pad_token = "!"
    if kind == "SD1.5":
        made = d.StableDiffusionPipeline(
            vae(4),
            clip_module("quick_gelu", False),
            words,
            unet(False),
            euler,
            None,
            None,
            requires_safety_checker=False,
        )
    elif kind == "SDXL":
        made = d.StableDiffusionXLPipeline(
            vae(4), clip_module("quick_gelu", False), clip_module("gelu", True), words, second, unet(True), euler
        )
    elif kind == "SD3":
        made = d.StableDiffusion3Pipeline(
            sd3(), flow, vae(16), clip_module("quick_gelu", True), words, clip_module("gelu", True), second,
            t5_module(160), t5_tokenizer(),
        )  # fmt: skip
    else:
        made = d.FluxPipeline(
            flow, vae(16), clip_module("quick_gelu", False), words, t5_module(64), t5_tokenizer(), flux("dev" in kind)
        )
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    made.save_pretrained(folder, safe_serialization=True)
    return made


def published(module: torch.nn.Module, table) -> dict[str, torch.Tensor]:
    """A diffusers module's weights in the published layout, by reading a table backwards."""
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    out = {}
    for original, targets in table.modules.items():
        if targets[0] in state:  # a bare parameter
            out[original] = state[targets[0]]
            continue
        for end in ("weight", "bias"):
            if f"{targets[0]}.{end}" not in state:
                continue
            value = torch.cat([state[f"{t}.{end}"] for t in targets])
            if original in table.swapped:
                value = torch.cat(value.chunk(2)[::-1])
            if original in table.flat and end == "weight":
                value = value[..., None, None]
            out[f"{original}.{end}"] = value
    return out


def open_clip(module) -> dict[str, torch.Tensor]:
    """A projected CLIP's weights in OpenCLIP's layout."""
    state = {k.removeprefix("text_model."): v.detach().clone() for k, v in module.state_dict().items()}
    out = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for end in ("weight", "bias"):
        out[f"ln_final.{end}"] = state[f"final_layer_norm.{end}"]
        for i in range(3):
            block, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
            qkv = [state[f"{layer}self_attn.{p}_proj.{end}"] for p in "qkv"]
            out[f"{block}attn.in_proj_{end}"] = torch.cat(qkv)
            out[f"{block}attn.out_proj.{end}"] = state[f"{layer}self_attn.out_proj.{end}"]
            for ours, theirs in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                                 ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                out[f"{block}{ours}.{end}"] = state[f"{layer}{theirs}.{end}"]
    return out


def single_file(kind: str, made, path: Path) -> None:
    """The same pipeline as one safetensors file in the published layout."""
    from retort.models.layouts import dit as layout_dit
    from retort.models.layouts import unet as layout_unet
    from retort.models.layouts import vae as layout_vae

    def prefixed(prefix: str, state):
        return {prefix + k: v.detach().clone().contiguous() for k, v in state.items()}

    def wrapped(module):
        names = module.state_dict()
        return {
            k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v for k, v in names.items()
        }

    text = "text_encoders.{}.transformer."
    if kind in ("SD1.5", "SDXL"):
        network = published(made.unet, layout_unet.layout(made.unet.config))
    elif kind == "SD3":
        network = published(made.transformer, layout_dit.sd3_layout(made.transformer.config))
    else:
        network = published(made.transformer, layout_dit.flux_layout(made.transformer.config))
        network = {k.replace("_norm.weight", "_norm.scale"): v for k, v in network.items()}
    tensors = prefixed("model.diffusion_model.", network)
    tensors |= prefixed("first_stage_model.", published(made.vae, layout_vae.layout(made.vae.config)))
    if kind == "SD1.5":
        tensors |= prefixed("cond_stage_model.transformer.", wrapped(made.text_encoder))
    elif kind == "SDXL":
        tensors |= prefixed("conditioner.embedders.0.transformer.", wrapped(made.text_encoder))
        tensors |= prefixed("conditioner.embedders.1.model.", open_clip(made.text_encoder_2))
    elif kind == "SD3":
        tensors |= prefixed(text.format("clip_l"), wrapped(made.text_encoder))
        tensors |= prefixed(text.format("clip_g"), wrapped(made.text_encoder_2))
        tensors |= prefixed(text.format("t5xxl"), made.text_encoder_3.state_dict())
    else:
        tensors |= prefixed(text.format("clip_l"), wrapped(made.text_encoder))
        tensors |= prefixed(text.format("t5xxl"), made.text_encoder_2.state_dict())
    save_file(tensors, path)
