"""Rewards by name: files found, network handed to the host's memory management, and a reward made of it.

`make(host, kind, settings)` serves nodes and jobs alike; `host` is a `hosts.contract.Host`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models import reward as judge
from ...models.judge import Layers
from ...models.loader import load_judge
from ...restoration.perceptual import lpips_weights_from, vgg16_from
from ...rewards import classifier, clip_models, deqa, image_reward, preprocess, simple
from ...rewards.contract import Reward
from ...rewards.heads import LinearHead, head_from
from ..contract import Host
from . import files
from .remote import RemoteReward
from .sheet import sheet as sheet
from .sheet import table as table

# Names of folders that the published repositories have.
USUAL = {
    "pick_score": ("yuvalkirstain/PickScore_v1",),
    "clip_score": ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"),
    "hps_v2": ("adams-story/HPSv2-hf",),
    "aesthetic": ("shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", "openai/clip-vit-large-patch14"),
    "image_reward": ("THUDM/ImageReward", "zai-org/ImageReward", "RE-N-Y/ImageReward"),
}
# What each of them reads of a model's folder, and about how much the usual one weighs.
WANTED = {
    "pick_score": "PickScore, 4 GB", "clip_score": "a CLIP, 1.7 GB", "hps_v2": "HPSv2, 4 GB",
    "aesthetic": "CLIP ViT-L/14 or the aesthetic predictor, 1.2 GB",
    "image_reward": "ImageReward as safetensors, 1.8 GB",
    "deqa": "a vision-language model", "classifier": "an image classifier",
    "likeness": "CLIP, DINOv2 or another vision model",
}  # fmt: skip
AESTHETIC_HEAD = "sac+logos+ava1-l14-linearMSE.safetensors"
PIXELS = "pixels"
VGG_FILE, LPIPS_FILE = "vgg16.safetensors", "lpips_vgg.safetensors"


def make(host: Host, kind: str, settings: Mapping[str, Any]) -> Reward:
    """A reward of KINDS. ValueError names the setting, its value and the remedy."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; use one of {', '.join(KINDS)}")
    # Whatever is made here must be able to give gradients later.
    with torch.inference_mode(False):
        return KINDS[kind](host, **settings)


def check_files(host: Host, kind: str, settings: Mapping[str, Any]) -> None:
    """ValueError where the files that a reward of KINDS needs are not there, in the words of `make`; reads none."""
    model = settings.get("model", "")
    if kind in WANTED and not (kind == "likeness" and _by_pixels(model)):
        _place(host, kind, model)
    if settings.get("head", "").strip():
        _head_file(host, settings["head"])


def _place(host: Host, kind: str, model: str) -> files.Place:
    files.transformers_or_error()
    return files.find(host.rewards_folders(), model, USUAL.get(kind, ()), WANTED[kind])


def _head_file(host: Host, head: str) -> Path:
    return files.find_file(host.rewards_folders(), head, AESTHETIC_HEAD, "the aesthetic head")


def _by_pixels(model: str) -> bool:
    return model.strip() in ("", PIXELS)


def perceptual_network(host: Host, name: str) -> nn.Module:
    """Images (B, H, W, 3) in [0, 1] to features of several depths: "judge", or "vgg16" from the folders of rewards."""
    if name == "judge":
        return Layers(load_judge())
    path = files.find_file(host.rewards_folders(), "", VGG_FILE, "torchvision's VGG16")
    with torch.inference_mode(False):
        return vgg16_from(files.read_tensors(path), path.name).requires_grad_(False)


def has_vgg16(host: Host) -> bool:
    """Whether the folders of rewards hold it."""
    return any((root / VGG_FILE).is_file() for root in host.rewards_folders())


def lpips_weights(host: Host) -> list[Tensor] | None:
    """LPIPS's learnt weights, None where the folders of rewards hold none."""
    for root in host.rewards_folders():
        if (root / LPIPS_FILE).is_file():
            return lpips_weights_from(files.read_tensors(root / LPIPS_FILE), LPIPS_FILE)
    return None


def _clip(host: Host, kind: str, name: str) -> tuple[Any, Any]:
    """(CLIPModel, tokenize)."""
    place = _place(host, kind, name)
    from transformers import CLIPModel

    _is_clip(place)
    model = files.load_model(place, CLIPModel, ("text_model.embeddings.position_ids",))
    return model, files.tokenize_with(files.tokenizer(place), model.config.text_config.max_position_embeddings)


def _is_clip(place: files.Place) -> None:
    found = files.config_of(place).model_type
    if found not in ("clip", "clip_vision_model"):
        raise ValueError(f"model {place.name!r} is a {found!r} and this reward needs a CLIP in transformers' layout")


def _vision(place: files.Place) -> Any:
    """The picture half of a CLIP, from a whole one or from one that was saved alone."""
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    if files.config_of(place).model_type == "clip_vision_model":
        return files.load_model(place, CLIPVisionModelWithProjection, ("vision_model.embeddings.position_ids",))
    model = files.load_model(place, CLIPModel)
    # The text half would only take memory.
    model.text_model, model.text_projection = nn.Identity(), nn.Identity()
    return model


def _pick_score(host: Host, model: str = "") -> Reward:
    return clip_models.pick_score(*_clip(host, "pick_score", model), host.hold)


def _clip_score(host: Host, model: str = "") -> Reward:
    return clip_models.clip_score(*_clip(host, "clip_score", model), host.hold)


def _hps_v2(host: Host, model: str = "") -> Reward:
    return clip_models.hps_v2(*_clip(host, "hps_v2", model), host.hold)


def _aesthetic(host: Host, model: str = "", head: str = "") -> Reward:
    place = _place(host, "aesthetic", model)
    _is_clip(place)
    top = None if head.strip() else _head_in(place)
    if top is None:
        top = _head(_head_file(host, head))
    return clip_models.aesthetic(_vision(place), top, host.hold)


def _head(path: Path) -> LinearHead:
    try:
        return head_from(files.read_tensors(path))
    except ValueError as error:
        raise ValueError(f"{path} is not an aesthetic head: {error}") from error


def _head_in(place: files.Place) -> LinearHead | None:
    """The head that a predictor's own file holds beside its backbone (shunk031's layout)."""
    for path in sorted(place.folder.glob("*.safetensors")) if place.folder is not None else []:
        tensors = files.read_tensors(path)
        if any(name.endswith("layers.7.weight") and "encoder." not in name for name in tensors):
            return head_from(tensors)
    return None


def _image_reward(host: Host, model: str = "") -> Reward:
    place = _place(host, "image_reward", model)
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    if place.folder is None:
        raise ValueError(
            f"model {place.name!r}: ImageReward is read from a folder in models/rewards only; put its safetensors and "
            "the tokenizer of bert-base-uncased (tokenizer.json or vocab.txt) there"
        )
    found = sorted(place.folder.glob("*.safetensors"))
    if len(found) != 1:
        pickled = [p.name for p in sorted(place.folder.iterdir()) if p.suffix in files.PICKLES]
        hint = f", and {pickled[0]} is a pickle: {files.CONVERT}" if pickled and not found else ": keep one"
        raise ValueError(f"model {place.name!r}: {place.folder} holds {len(found)} safetensors files{hint}")
    sorted_parts = image_reward.parts(files.read_tensors(found[0]))
    with torch.random.fork_rng(devices=[]):
        vision = BlipVisionModel(BlipVisionConfig(**sorted_parts.vision_sizes))
        text = BlipTextModel(BlipTextConfig(**sorted_parts.text_sizes), add_pooling_layer=False)
    for network, state in ((vision, sorted_parts.vision), (text, sorted_parts.text)):
        _fill(network, state, found[0])
    tokenize = files.tokenize_with(files.tokenizer(place), image_reward.TOKENS)
    return image_reward.image_reward(vision, text, sorted_parts.head, tokenize, host.hold)


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    missing, unknown = network.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or unknown:
        raise ValueError(
            f"{path} {'lacks' if missing else 'has an unknown'} {(missing or unknown)[0]}: it is not ImageReward's, or "
            "was cut short"
        )
    network.eval().requires_grad_(False)


class Levels(nn.Module):
    """A vision-language model that gives the logits of five words at the end of its prompt."""

    def __init__(self, model: nn.Module, tokens: list[int]):
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, 5)."""
        kind = next(self.model.parameters()).dtype
        inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in inputs.items()}
        return self.model(**inputs).logits[:, -1, self.tokens]


def _deqa(host: Host, model: str = "") -> Reward:
    place = _place(host, "deqa", model)
    from transformers import AutoModelForImageTextToText

    try:
        files.config_of(place)
    except ValueError as error:
        if "mplug_owl2" not in str(error):
            raise
        raise ValueError(
            f"model {place.name!r} is the published DeQA-Score, which needs transformers 4.36 and code of its own: "
            "run it as a process of its own (kind remote; its help page says how), or take another model here"
        ) from error
    network = files.load_model(place, AutoModelForImageTextToText, ("lm_head.",), precise=False)
    # Seven billion parameters in fp32 fit few cards; on a CPU half precision is slow.
    network = network.to(torch.bfloat16) if host.bf16() else network.float()
    take = files.processor(place)
    tokens = deqa.level_tokens(lambda text: take.tokenizer(text, add_special_tokens=False)["input_ids"])
    text = asked(take, place)

    def prepare(pictures: Tensor) -> dict[str, Tensor]:
        from PIL import Image

        images = [[Image.fromarray(p.numpy())] for p in pictures]
        return dict(take(images=images, text=[text] * len(images), return_tensors="pt"))

    return deqa.LevelReward(host.hold(Levels(network, tokens)), prepare, f"DeQA by {place.name}")


def asked(take: Any, place: files.Place) -> str:
    """The question with the picture, in the model's own form of conversation."""
    if take.chat_template or take.tokenizer.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": deqa.QUESTION}]
        talk = take.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return f"{talk.rstrip(' ')}{'' if talk.endswith(chr(10)) else ' '}{deqa.ANSWER}"
    if "image_token" not in vars(take):
        raise ValueError(f"model {place.name!r} has neither a chat template nor an image token: use another model")
    return f"USER: {deqa.QUESTION}\n{take.image_token}\nASSISTANT: {deqa.ANSWER}"


def _classifier(host: Host, model: str = "", label: str = "", measure: str = "log probability") -> Reward:
    place = _place(host, "classifier", model)
    from transformers import AutoModelForImageClassification

    network = files.load_model(place, AutoModelForImageClassification)
    return classifier.classifier(network, _preparation(place), label, measure, host.hold)


def _preparation(place: files.Place) -> preprocess.Preprocess:
    try:
        return preprocess.from_settings(files.image_settings(place))
    except ValueError as error:
        raise ValueError(f"model {place.name!r}: {error}") from error


def _likeness(host: Host, reference: Tensor | None = None, model: str = "") -> Reward:
    if reference is None:
        raise ValueError("likeness has nothing to be like: connect `reference`")
    reference = reference.detach().clone()
    if _by_pixels(model):
        return simple.PixelLikeness(reference)
    place = _place(host, "likeness", model)
    from transformers import AutoModel

    if files.config_of(place).model_type in ("clip", "clip_vision_model"):
        network = _vision(place)
        fit = clip_models.sized(preprocess.CLIP, network)
        return clip_models.likeness(network, clip_models.image_features, fit, reference, host.hold)
    network = files.load_model(place, AutoModel)
    return clip_models.likeness(network, clip_models.pooled_features, _preparation(place), reference, host.hold)


def jpeg_bytes(picture: Tensor, quality: int) -> bytes:
    """One picture (H, W, 3) uint8 as a JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _jpeg(host: Host, prefer: str = "small", quality: int = 95) -> Reward:
    return simple.JpegSize(jpeg_bytes, quality, prefer)


def _judge(host: Host, boldness: float = 0.0) -> Reward:
    return judge.judge_reward(host.hold, boldness)


def _remote(host: Host, url: str = "") -> Reward:
    return RemoteReward(url, host.check_cancelled)


KINDS: dict[str, Callable[..., Reward]] = {
    "embedded_judge": _judge,
    "pick_score": _pick_score,
    "hps_v2": _hps_v2,
    "image_reward": _image_reward,
    "clip_score": _clip_score,
    "aesthetic": _aesthetic,
    "deqa": _deqa,
    "classifier": _classifier,
    "likeness": _likeness,
    "jpeg": _jpeg,
    "sharpness": lambda host: simple.Sharpness(),
    "colourfulness": lambda host: simple.Colourfulness(),
    "remote": _remote,
}
