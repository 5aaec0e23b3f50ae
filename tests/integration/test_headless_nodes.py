"""The headless core nodes against ComfyUI's own: names, order, defaults and ranges of inputs, and what they compute."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

pytestmark = pytest.mark.integration
EXTRAS = ("images", "custom_sampler", "sd3", "model_advanced", "flux", "primitive", "preview_any", "train")
# Ours lists fewer: what the headless host can run.
SHORTER = {"sampler_name", "scheduler", "sampling", "weight_dtype"}


@pytest.fixture(scope="module")
def core(comfy) -> dict[str, type]:
    """Every node class of ComfyUI that ours may stand for, by id."""
    found = dict(comfy.nodes.NODE_CLASS_MAPPINGS)
    for name in EXTRAS:
        extra = importlib.import_module(f"comfy_extras.nodes_{name}")
        found |= getattr(extra, "NODE_CLASS_MAPPINGS", {})
        for cls in vars(extra).values():
            if inspect.isclass(cls) and cls.__module__ == extra.__name__ and hasattr(cls, "define_schema"):
                found[cls.define_schema().node_id] = cls
    return found


def theirs_of(cls) -> list[tuple]:
    """(name, type, options) of every input in the editor's order."""
    types = cls.INPUT_TYPES()
    rows = []
    for part in ("required", "optional"):
        for name, spec in types.get(part, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            rows.append((name, kind, options))
    return rows


def test_every_schema_is_cores(core, ours):
    dynamic, inputs = ours("graphs.dynamic"), ours("graphs.api.inputs")
    files = ours("graphs.file_inputs")
    nodes = ours("graphs.core").NODES
    assert len(nodes) > 30
    for node in nodes:
        schema = node.GET_SCHEMA()
        id = schema.node_id
        cls = core[id]
        rows = theirs_of(cls)
        mine = dynamic.in_order(schema.inputs)
        assert [i.id for i in mine] == [name for name, _, _ in rows], id
        for one, (name, kind, options) in zip(mine, rows, strict=True):
            assert one.get_io_type() == kind, (id, name)
            if isinstance(one, files.FileInput):
                continue
            if isinstance(one, inputs.NumberInput):
                assert (one.min, one.max) == (options.get("min"), options.get("max")), (id, name)
            if isinstance(one, inputs.ComboInput):
                given = options["options"]
                assert set(one.options) <= set(given) if name in SHORTER else one.options == list(given), (id, name)
            elif isinstance(one, inputs.WidgetInput) and "default" in options:
                assert one.default == options["default"], (id, name)
            if isinstance(one, inputs.IntInput):
                assert bool(one.control_after_generate) == bool(options.get("control_after_generate")), (id, name)
        assert [o.get_io_type() for o in schema.outputs] == list(cls.RETURN_TYPES), id
        assert schema.is_output_node == bool(getattr(cls, "OUTPUT_NODE", False)), id


def called(cls, **inputs):
    """Outputs of a core node of either generation."""
    with torch.inference_mode():
        if hasattr(cls, "define_schema"):
            return cls.execute(**inputs).args
        out = getattr(cls(), cls.FUNCTION)(**inputs)
    return out["result"] if isinstance(out, dict) else out


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def latent(batch, mask=0, index=None):
    generator = torch.Generator().manual_seed(batch)
    made = {"samples": torch.randn(batch, 4, 6, 5, generator=generator)}
    if mask:
        made["noise_mask"] = torch.rand(mask, 1, 48, 40, generator=generator)
    if index is not None:
        made["batch_index"] = index
    return made


def conditioning():
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(1, 7, 8, generator=generator), {"pooled_output": torch.ones(1, 4), "guidance": 2.0}]]


SIGMAS = torch.tensor([14.0, 7.0, 2.0, 0.5, 0.0])
CALLS = [
    ("EmptyLatentImage", {"width": 72, "height": 48, "batch_size": 2}),
    ("EmptySD3LatentImage", {"width": 64, "height": 48, "batch_size": 2}),
    ("RepeatLatentBatch", {"samples": latent(3, mask=3, index=[4, 5, 7]), "amount": 2}),
    ("RepeatLatentBatch", {"samples": latent(2, mask=1), "amount": 3}),
    ("LatentFromBatch", {"samples": latent(4), "batch_index": -1, "length": 3}),
    ("LatentFromBatch", {"samples": latent(4, mask=2, index=[3, 1, 8, 9]), "batch_index": 1, "length": 2}),
    ("LatentFromBatch", {"samples": latent(2, mask=1), "batch_index": 9, "length": 64}),
    ("SetLatentNoiseMask", {"samples": latent(2), "mask": torch.rand(2, 48, 40)}),
    ("ConditioningZeroOut", {"conditioning": conditioning()}),
    ("ConditioningCombine", {"conditioning_1": conditioning(), "conditioning_2": conditioning()}),
    ("FluxGuidance", {"conditioning": conditioning(), "guidance": 4.0}),
    ("ImageBatch", {"image1": torch.rand(1, 20, 30, 3), "image2": torch.rand(2, 40, 31, 3)}),
    ("ImageBatch", {"image1": torch.rand(1, 20, 30, 4), "image2": torch.rand(2, 15, 60, 3)}),
    *(
        (
            "ImageStitch",
            {
                "image1": torch.rand(2, 20, 30, 3),
                "image2": torch.rand(1, 20, 30, 3),
                "direction": direction,
                "match_image_size": direction in ("right", "up"),
                "spacing_width": 4,
                "spacing_color": colour,
            },
        )
        for direction, colour in (("right", "white"), ("down", "red"), ("left", "black"), ("up", "blue"))
    ),
    ("SplitSigmas", {"sigmas": SIGMAS, "step": 2}),
    ("FlipSigmas", {"sigmas": SIGMAS}),
    ("FlipSigmas", {"sigmas": SIGMAS[:0]}),
    ("ManualSigmas", {"sigmas": "1, 0.75 .5;0"}),
    ("PrimitiveInt", {"value": 7}),
    *(
        ("PreviewAny", {"source": value})
        for value in ("text", 3, 0.5, True, None, {"é": [1, 2.0]}, torch.ones(2), {1, 2})
    ),
]


@pytest.mark.parametrize(("name", "inputs"), CALLS, ids=[name for name, _ in CALLS])
def test_a_node_computes_what_cores_does(core, ours, name, inputs):
    mine = {node.GET_SCHEMA().node_id: node for node in ours("graphs.core").NODES}[name]
    assert same(tuple(mine.execute(**inputs).args), tuple(called(core[name], **inputs)))


@pytest.fixture(scope="module")
def model(comfy, ours, sd3_weights, tmp_path_factory):
    """(headless, ComfyUI) MODEL of one random SD3-layout network."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("sd3") / "network.safetensors"
    save_file(sd3_weights, path)
    loader = ours("hosts.headless.diffusers_loader")
    return loader.load_diffusion_model(path), comfy.sd.load_diffusion_model(str(path))


def prompts():
    generator = torch.Generator().manual_seed(4)
    return [
        [[torch.randn(1, 9, 128, generator=generator), {"pooled_output": torch.randn(1, 128, generator=generator)}]]
        for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("KSampler", {"denoise": 0.6, "sampler_name": "dpmpp_2m"}),
        ("KSampler", {"scheduler": "beta", "sampler_name": "ddim"}),
        ("KSamplerAdvanced", {"start_at_step": 2, "end_at_step": 5, "return_with_leftover_noise": "enable"}),
        ("KSamplerAdvanced", {"end_at_step": 3, "return_with_leftover_noise": "disable"}),
        ("KSamplerAdvanced", {"start_at_step": 3, "add_noise": "disable"}),
        ("KSamplerAdvanced", {"start_at_step": 50}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_sampling_nodes_agree(core, ours, model, name, changes, masked):
    positive, negative = prompts()
    generator = torch.Generator().manual_seed(8)
    image = {"samples": torch.randn(2, 16, 8, 6, generator=generator), "batch_index": [3, 1]}
    if masked:
        image["noise_mask"] = (torch.rand(1, 1, 64, 48, generator=generator) > 0.5).float()
    inputs = {"steps": 8, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "positive": positive,
              "negative": negative, "latent_image": image}  # fmt: skip
    if name == "KSampler":
        inputs |= {"seed": 6, "denoise": 1.0}
    else:
        inputs |= {"noise_seed": 6, "add_noise": "enable", "start_at_step": 0, "end_at_step": 10000,
                   "return_with_leftover_noise": "disable"}  # fmt: skip
    inputs |= changes
    mine = {node.GET_SCHEMA().node_id: node for node in ours("graphs.core").NODES}[name]
    ours_out = mine.execute(model=model[0], **inputs).args[0]
    theirs_out = called(core[name], model=model[1], **inputs)[0]
    assert ours_out.keys() == theirs_out.keys()
    scale = max(1.0, float(theirs_out["samples"].abs().max()))
    assert float((ours_out["samples"] - theirs_out["samples"]).abs().max()) <= 1e-4 * scale


def test_both_outputs_of_a_custom_run_agree(core, ours, model):
    """SamplerCustom and SamplerCustomAdvanced on part of a grid, at another shift: latent and last x0."""
    positive, negative = prompts()
    nodes = {node.GET_SCHEMA().node_id: node for node in ours("graphs.core").NODES}
    results = []
    for table, base in ((nodes, model[0]), (core, model[1])):

        def call(name, table=table, **inputs):
            cls = table[name]
            return called(cls, **inputs)

        (shifted,) = call("ModelSamplingSD3", model=base, shift=5.0)
        (sigmas,) = call("BasicScheduler", model=shifted, scheduler="normal", steps=6, denoise=0.8)
        (high, _) = call("SplitSigmas", sigmas=sigmas, step=3)
        (sampler,) = call("KSamplerSelect", sampler_name="heun")
        (guider,) = call("CFGGuider", model=shifted, positive=positive, negative=negative, cfg=3.0)
        (noise,) = call("RandomNoise", noise_seed=4)
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        one = call(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=high, latent_image=latent
        )
        (quiet,) = call("DisableNoise")
        (basic,) = call("BasicGuider", model=shifted, conditioning=positive)
        (rest,) = call("FlipSigmas", sigmas=high)
        two = call(
            "SamplerCustomAdvanced", noise=quiet, guider=basic, sampler=sampler, sigmas=rest, latent_image=one[1]
        )
        three = call(
            "SamplerCustom", model=shifted, add_noise=True, noise_seed=9, cfg=1.0, positive=positive,
            negative=negative, sampler=sampler, sigmas=high, latent_image=latent,
        )  # fmt: skip
        (turbo,) = call("SDTurboScheduler", model=shifted, steps=2, denoise=0.7)
        results.append([*one, *two, *three, {"samples": turbo}])
    for mine, theirs in zip(*results, strict=True):
        scale = max(1.0, float(theirs["samples"].abs().max()))
        assert mine["samples"].shape == theirs["samples"].shape
        assert float((mine["samples"] - theirs["samples"]).abs().max()) <= 1e-4 * scale
