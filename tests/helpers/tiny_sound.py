"""Tiny networks of ComfyUI's own classes for video with sound, as MODELs that can be read again."""

from __future__ import annotations

import copy
import importlib

import torch

# Of the network; the parts of a latent; tokens and width of a prompt; channels of the first axis that is patched.
LTX = {
    "image_model": "ltxav", "num_layers": 2, "cross_attention_dim": 64, "attention_head_dim": 32,
    "num_attention_heads": 2, "caption_channels": 64, "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 2, "connector_attention_head_dim": 32, "connector_num_attention_heads": 2,
    "connector_num_layers": 1,
}  # fmt: skip
H3 = {
    "image_model": "minimax_h3", "hidden_size": 128, "num_layers": 2, "token_refiner_num_layers": 1,
    "num_attention_heads": 1, "attention_head_dim": 128, "ffn_hidden_size": 128, "text_dim": 64,
    "timestep_input_dim": 64, "time_embed_hidden_size": 64, "time_embed_dim": 64, "rope_inv_freq_len": 16,
}  # fmt: skip
KINDS = {
    "LTXAV": (LTX, ((128, 2, 4, 4), (8, 6, 16)), (8, 128), {"frame_rate": 25}),
    "MiniMaxH3": (H3, ((24, 2, 8, 8), (32, 2, 3)), (8, 64), {}),
}


def shapes(kind: str) -> tuple[tuple[int, ...], ...]:
    """Of the parts of one latent: video, sound."""
    return KINDS[kind][1]


def model(kind: str, disable_dynamic: bool = False):
    """A MODEL of random weights, the same every time."""
    models = importlib.import_module("comfy.supported_models")
    config = getattr(models, kind)(copy.deepcopy(KINDS[kind][0]))
    config.set_inference_dtype(torch.float32, None)
    made = config.get_model({})
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, weight in made.diffusion_model.named_parameters():
            if weight.ndim >= 2:
                weight.copy_(draw(weight.shape) * min(0.16, weight[0].numel() ** -0.5))
            else:
                weight.copy_(float(name.endswith(("weight", "scale"))) + 0.02 * draw(weight.shape))
        for name, buffer in made.diffusion_model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(draw(buffer.shape).abs() / 4)
    patcher = importlib.import_module("comfy.model_patcher").CoreModelPatcher(
        made, load_device=torch.device("cpu"), offload_device=torch.device("cpu")
    )
    patcher.cached_patcher_init = (model, (kind,))
    return patcher


def prompt(kind: str, seed: int, longer: int = 0):
    """A CONDITIONING."""
    tokens, width = KINDS[kind][2]
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens + longer, width, generator=generator), dict(KINDS[kind][3])]]


def nested(parts):
    """LATENT samples of these parts."""
    return importlib.import_module("comfy.nested_tensor").NestedTensor(parts)


def empty(kind: str, batch: int = 1):
    """An empty LATENT."""
    return {"samples": nested([torch.zeros(batch, *shape) for shape in shapes(kind)])}


def filled(kind: str, seed: int, batch: int = 1):
    """LATENT samples of numbers."""
    generator = torch.Generator().manual_seed(seed)
    return nested([0.5 * torch.randn(batch, *shape, generator=generator) for shape in shapes(kind)])


class FirstFrames:
    """In place of a VAE: its pictures are the video's first three channels."""

    def decode(self, samples):
        """(B, T, H, W, 3)."""
        assert samples.ndim == 5
        return samples[:, :3].movedim(1, -1).sigmoid()
