"""Rewards on CLIP: CLIPScore, PickScore, HPSv2, the LAION aesthetic predictor, likeness to a picture.

CLIPScore: Hessel et al. 2021 (arXiv 2104.08718). PickScore: Kirstain et al. 2023 (arXiv 2305.01569), eq. 1.
HPSv2: Wu et al. 2023 (arXiv 2306.09341). The aesthetic predictor: LAION, "improved-aesthetic-predictor".

All want 224 pixels, CLIP's mean and deviation, and 77 tokens; HPSv2 pads where the others crop. A model is
transformers' CLIPModel, of which only `vision_model`, `text_model`, both projections and `logit_scale` are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Holder
from .heads import LinearHead
from .network import NetworkReward, Tokenize
from .preprocess import CLIP, HPS, Preprocess

TOKENS = 77
Hold = Callable[[nn.Module], Holder]


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors (B, D) of prepared pictures (B, 3, h, w)."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def text_features(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors (N, D) of tokens (N, L)."""
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


class Agreement(nn.Module):
    """scale * cos(picture, prompt); scale None: the model's own, exp(logit_scale)."""

    def __init__(self, model: nn.Module, scale: float | None):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        """See `network.NetworkReward`."""
        cosine = (image_features(self.model, pixels) * text_features(self.model, ids, mask)[index]).sum(-1)
        return cosine * (self.model.logit_scale.exp() if self.scale is None else self.scale)  # type: ignore[operator]


class Beauty(nn.Module):
    """The aesthetic predictor: a linear head on unit image features."""

    def __init__(self, model: nn.Module, head: LinearHead):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B,)."""
        return self.head(image_features(self.model, pixels))


class Likeness(nn.Module):
    """Cosine between features of pictures and of a reference, `features(model, pixels) -> (B, D)` of length one."""

    def __init__(self, model: nn.Module, features: Callable[[Any, Tensor], Tensor], reference: Tensor):
        super().__init__()
        self.reference: Tensor
        self.model, self.features = model, features
        self.register_buffer("reference", reference, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B,): the mean over the reference's pictures."""
        found, wanted = (self.features(self.model, p) for p in (pixels, self.reference))
        return (found @ wanted.T).mean(-1)


def pooled_features(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors (B, D) of any vision model of transformers: its pooled state, or its first token's (DINOv2)."""
    out = model(pixel_values=pixels)
    pooled = out.get("pooler_output")
    pooled = out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
    return F.normalize(pooled, dim=-1)


def _agreement(name: str, model: Any, tokenize: Tokenize, hold: Hold, scale: float | None, fit: Preprocess) -> Any:
    most = float(model.logit_scale.exp()) if scale is None else scale
    network = Agreement(model, scale)
    return NetworkReward(name, hold(network), fit, (-most, most), tokenize)


def sized(preprocess: Preprocess, model: Any) -> Preprocess:
    """The preprocessing at the size that the model's own position embeddings have."""
    side = model.vision_model.config.image_size
    return Preprocess(int(side), preprocess.fit, preprocess.mean, preprocess.std, preprocess.resample)


def clip_score(model: Any, tokenize: Tokenize, hold: Hold) -> NetworkReward:
    """100 cos; without the paper's cut at 0, which has no gradient. Usual values 15 to 35."""
    return _agreement("CLIPScore", model, tokenize, hold, 100.0, sized(CLIP, model))


def pick_score(model: Any, tokenize: Tokenize, hold: Hold) -> NetworkReward:
    """cos exp(logit_scale); usual values 17 to 25."""
    return _agreement("PickScore", model, tokenize, hold, None, sized(CLIP, model))


def hps_v2(model: Any, tokenize: Tokenize, hold: Hold) -> NetworkReward:
    """100 cos; usual values 20 to 33. Versions 2.0 and 2.1 cannot be compared, nor scores of different prompts."""
    return _agreement("HPSv2", model, tokenize, hold, 100.0, sized(HPS, model))


def aesthetic(model: Any, head: LinearHead, hold: Hold) -> NetworkReward:
    """About 1 to 10. ValueError when the head belongs to another backbone."""
    width, takes = model.visual_projection.out_features, head.layers["0"].in_features
    if width != takes:
        raise ValueError(
            f"the aesthetic head takes {takes} features and this CLIP gives {width}: the published head is for "
            "openai/clip-vit-large-patch14"
        )
    # The head is one linear map of a unit vector, so its range is exact.
    weight, bias = head.collapsed()
    reach = float(weight.norm())
    return NetworkReward(
        "LAION aesthetic", hold(Beauty(model, head)), sized(CLIP, model), (float(bias) - reach, float(bias) + reach)
    )


def likeness(
    model: Any, features: Callable[[Any, Tensor], Tensor], preprocess: Preprocess, reference: Tensor, hold: Hold
) -> NetworkReward:
    """Cosine of features to those of `reference` (N, H, W, 3), the mean over its pictures."""
    network = Likeness(model, features, preprocess(reference.detach()))
    return NetworkReward("likeness", hold(network), preprocess, (-1.0, 1.0))
