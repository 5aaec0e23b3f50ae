"""Tiny networks of ComfyUI's real classes, by family, for what concerns the names of their layers."""

from __future__ import annotations

import copy
import importlib

import torch

_FLUX = {
    "in_channels": 16, "out_channels": 16, "context_in_dim": 64, "hidden_size": 128, "num_heads": 1, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256,
}  # fmt: skip
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": 64, "n_layers": 2,
    "n_refiner_layers": 1, "qk_norm": True, "ffn_dim_multiplier": 1.0, "multiple_of": 32, "rope_theta": 256.0,
}  # fmt: skip
CONFIGS = {
    "WAN21_T2V": {
        "image_model": "wan2.1", "patch_size": (1, 2, 2), "in_dim": 16, "dim": 128, "ffn_dim": 256, "freq_dim": 256,
        "out_dim": 16, "num_heads": 1, "num_layers": 2, "text_dim": 64, "model_type": "t2v",
    },
    "MiniMaxH3": {
        "image_model": "minimax_h3", "hidden_size": 128, "num_layers": 2, "token_refiner_num_layers": 1,
        "num_attention_heads": 1, "attention_head_dim": 128, "ffn_hidden_size": 192, "text_dim": 64,
    },
    "HunyuanVideo": {
        **_FLUX, "image_model": "hunyuan_video", "vec_in_dim": 48, "mlp_ratio": 4.0, "patch_size": [1, 2, 2],
        "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
        "vision_in_dim": None, "meanflow_sum": False,
    },
    "Flux2": {
        **_FLUX, "image_model": "flux2", "vec_in_dim": None, "mlp_ratio": 3.0, "in_channels": 128, "out_channels": 128,
        "axes_dim": [32, 32, 32, 32], "patch_size": 1, "qkv_bias": False, "ops_bias": False, "global_modulation": True,
        "mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3],
        "guidance_embed": True, "yak_mlp": False, "txt_norm": False,
    },
    "ZImage": {
        **_LUMINA, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
        "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    },
    "Lumina2": {
        **_LUMINA, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [32, 16, 16], "axes_lens": [300, 512, 512],
    },
    "QwenImage": {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 1,
        "joint_attention_dim": 64,
    },
    "LTXV": {
        "image_model": "ltxv", "num_layers": 2, "cross_attention_dim": 64, "attention_head_dim": 32,
        "num_attention_heads": 2, "caption_channels": 64,
    },
    "Krea2": {
        "image_model": "krea2", "features": 128, "channels": 16, "patch": 2, "heads": 1, "kvheads": 1, "txtlayers": 2,
        "txtdim": 640, "layers": 2,
    },
    "ErnieImage": {
        "image_model": "ernie", "hidden_size": 128, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 128,
        "text_in_dim": 64,
    },
    "Anima": {
        "image_model": "anima", "in_channels": 16,
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "out_channels": 16, "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": 128, "concat_padding_mask": True, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True,
        "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 1,
    },
    "Lens": {
        "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 2, "num_attention_heads": 2,
        "enc_hidden_dim": 64, "multi_layer_encoder_feature": False, "selected_layer_index": (0,),
    },
    "Boogu": {
        "image_model": "boogu", "hidden_size": 120, "num_layers": 2, "num_double_stream_layers": 1,
        "num_refiner_layers": 1, "instruction_feat_dim": 64, "num_attention_heads": 1, "num_kv_heads": 1,
        "multiple_of": 32,
    },
    "Omnigen2": {
        "image_model": "omnigen2", "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664],
        "ffn_dim_multiplier": None, "hidden_size": 120, "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-5,
        "num_attention_heads": 1, "num_kv_heads": 1, "num_layers": 2, "num_refiner_layers": 1, "out_channels": None,
        "patch_size": 2, "text_feat_dim": 64, "timestep_scale": 1000.0,
    },
}  # fmt: skip


def model(name: str):
    """A ModelPatcher of a family, its weights whatever memory held: nobody computes with them."""
    families = importlib.import_module("comfy.supported_models")
    config = getattr(families, name)(copy.deepcopy(CONFIGS[name]))
    config.set_inference_dtype(torch.float32, None)
    made = config.get_model({})
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    return patcher(made, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
