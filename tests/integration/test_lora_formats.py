"""Published LoRA files under the names that ComfyUI refuses or reads in part, on tiny networks of its real classes.

The effect of each is that of the same weights under ComfyUI's own names, read by its own loader.
"""

from __future__ import annotations

import functools

import pytest
import tiny_families
import torch

pytestmark = pytest.mark.integration

A, DEFAULT, KOHYA = (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight"), (
    ".lora_down.weight", ".lora_up.weight",
)  # fmt: skip
QKV = [("to_q", 0, 3), ("to_k", 1, 3), ("to_v", 2, 3)]


def apart(stem, layer, ends=QKV):
    """{stem + end: (layer, its part, of how many)}."""
    return {stem + end: (layer, part, of) for end, part, of in ends}


# family, spelling, {stem in the file: own layer, or (own layer, part, of how many)}
FORMATS = {
    "wan diffusers": ("WAN21_T2V", A, {
        "transformer.blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
        "transformer.blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
        "transformer.blocks.1.ffn.net.0.proj": "blocks.1.ffn.0", "transformer.blocks.0.ffn.net.2": "blocks.0.ffn.2",
        "transformer.condition_embedder.time_proj": "time_projection.1", "transformer.proj_out": "head.head",
    }),
    "wan peft": ("WAN21_T2V", A, {
        "blocks.0.cross_attn.k": "blocks.0.cross_attn.k",
        "base_model.model.blocks.1.self_attn.q": "blocks.1.self_attn.q",
        "base_model.model.blocks.0.ffn.0": "blocks.0.ffn.0",
    }),
    "wan kohya": ("WAN21_T2V", KOHYA, {
        "lora_unet__blocks_0_cross_attn_k": "blocks.0.cross_attn.k", "lora_unet_blocks_1_ffn_2": "blocks.1.ffn.2",
    }),
    "qwen peft": ("QwenImage", A, {
        "base_model.model.transformer_blocks.0.attn.to_k": "transformer_blocks.0.attn.to_k",
        "base_model.model.transformer_blocks.1.img_mlp.net.2": "transformer_blocks.1.img_mlp.net.2",
    }),
    "flux2 peft": ("Flux2", A, {
        **apart("base_model.model.transformer_blocks.1.attn.", "double_blocks.1.img_attn.qkv"),
        "base_model.model.single_transformer_blocks.0.attn.to_qkv_mlp_proj": "single_blocks.0.linear1",
        "base_model.model.single_transformer_blocks.1.attn.to_out": "single_blocks.1.linear2",
    }),
    "z-image peft": ("ZImage", A, {
        **apart("base_model.model.layers.0.attention.", "layers.0.attention.qkv"),
        "base_model.model.layers.0.attention.to_out.0": "layers.0.attention.out",
        "base_model.model.noise_refiner.0.feed_forward.w1": "noise_refiner.0.feed_forward.w1",
    }),
    "z-image kohya": ("ZImage", KOHYA, {
        **apart("lora_unet_layers_1_attention_", "layers.1.attention.qkv"),
        "lora_unet_layers_0_attention_to_v": ("layers.0.attention.qkv", 2, 3),
        "lora_unet_context_refiner_0_attention_to_out_0": "context_refiner.0.attention.out",
    }),
    "ltx transformer": ("LTXV", A, {
        "transformer.transformer_blocks.0.attn1.to_k": "transformer_blocks.0.attn1.to_k",
        "transformer.transformer_blocks.1.ff.net.0.proj": "transformer_blocks.1.ff.net.0.proj",
        "transformer.proj_in": "patchify_proj", "transformer.time_embed.linear": "adaln_single.linear",
    }),
    "anima": ("Anima", A, {
        "transformer.blocks.0.self_attn.q_proj": "blocks.0.self_attn.q_proj",
        "blocks.1.mlp.layer1": "blocks.1.mlp.layer1",
        "transformer.transformer_blocks.1.attn2.to_k": "blocks.1.cross_attn.k_proj",
    }),
    "lens": ("Lens", A, {
        "transformer.transformer_blocks.0.attn.img_qkv": "transformer_blocks.0.attn.img_qkv",
        "transformer_blocks.1.txt_mlp.w2": "transformer_blocks.1.txt_mlp.w2",
    }),
    "boogu": ("Boogu", A, {
        "transformer.single_stream_layers.0.attn.to_q": "single_stream_layers.0.attn.to_q",
        "transformer.double_stream_layers.0.img_instruct_attn.processor.img_to_q":
            "double_stream_layers.0.img_instruct_attn.processor.img_to_q",
    }),
    "omnigen2": ("Omnigen2", A, {"transformer.layers.1.attn.to_out.0": "layers.1.attn.to_out.0"}),
    "ernie bare": ("ErnieImage", A, {
        "layers.0.self_attention.to_q": "layers.0.self_attention.to_q",
        "layers.1.mlp.gate_proj": "layers.1.mlp.gate_proj",
    }),
    "hunyuan bare": ("HunyuanVideo", A, {
        "double_blocks.0.img_attn_qkv": "double_blocks.0.img_attn.qkv",
        "double_blocks.1.txt_mlp.fc2": "double_blocks.1.txt_mlp.2",
        "single_blocks.0.linear1": "single_blocks.0.linear1",
        "single_blocks.1.modulation.linear": "single_blocks.1.modulation.lin",
    }),
    "hunyuan diffusers": ("HunyuanVideo", A, {
        **apart("transformer.transformer_blocks.0.attn.", "double_blocks.0.img_attn.qkv"),
        **apart("transformer.transformer_blocks.0.attn.", "double_blocks.0.txt_attn.qkv",
                [("add_q_proj", 0, 3), ("add_k_proj", 1, 3), ("add_v_proj", 2, 3)]),
        "transformer.single_transformer_blocks.1.attn.to_k": ("single_blocks.1.linear1", 1, 7),
        "transformer.transformer_blocks.1.ff.net.0.proj": "double_blocks.1.img_mlp.0",
    }),
    "h3 originals": ("MiniMaxH3", DEFAULT, {
        **apart("transformer_blocks.0.attn.", "blocks.0.attn.qkv_proj"),
        "transformer_blocks.1.attn.to_out.0": "blocks.1.attn.out_proj",
        "transformer_blocks.1.ff.net.2": "blocks.1.mlp.fc2",
        "token_refiner.refiner_blocks.0.attn.to_q": ("token_refiner.blocks.0.attn.qkv_proj", 0, 3),
    }),
    "krea": ("Krea2", A, {
        "base_model.model.transformer_blocks.0.attn.to_gate": "blocks.0.attn.gate",
        "transformer_blocks.1.ff.down": "blocks.1.mlp.down",
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(comfy):
    return functools.cache(tiny_families.model)


def weight(model, layer):
    return dict(model.model.diffusion_model.named_parameters())[f"{layer}.weight"]


def file_of(model, spelling, places, rank=3):
    """(tensors of the file, {own layer: (shape, what is added to its weight)})."""
    generator = torch.Generator().manual_seed(1)
    state, added = {}, {}
    for stem, place in places.items():
        layer, part, of = (place, 0, 1) if isinstance(place, str) else place
        shape = tuple(weight(model, layer).shape)
        rows = shape[0] // of
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(rows, rank, *(1 for _ in shape[2:]), generator=generator)
        state |= {stem + spelling[0]: down, stem + spelling[1]: up}
        scale = 1.0
        if spelling is KOHYA:
            state[f"{stem}.alpha"], scale = torch.tensor(2.0), 2 / rank
        whole = added.setdefault(layer, torch.zeros(shape))
        whole[part * rows : (part + 1) * rows] += scale * (up.flatten(1) @ down.flatten(1)).view(rows, *shape[1:])
    return state, added


def patched(comfy, model, layer, at=1.0):
    """A layer's weight, random, under a MODEL's patches."""
    key = f"diffusion_model.{layer}.weight"
    plain = torch.randn(weight(model, layer).shape, generator=torch.Generator().manual_seed(2))
    return comfy.lora.calculate_weight(model.patches.get(key, []), plain.clone(), key), plain


def close(a, b):
    return float((a - b).abs().max()) <= 2e-6 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
def test_the_effect_is_that_of_comfyuis_own_names(comfy, ours, models, name):
    family, spelling, places = FORMATS[name]
    model, told = models(family), []
    state, added = file_of(model, spelling, places)
    got = ours("hosts.comfyui.loras").applied(model, state, {}, 0.5, told.append)
    assert not told and not model.patches
    differences = {f"diffusion_model.{layer}.diff": value for layer, value in added.items()}
    own = comfy.sd.load_lora_for_models(model, None, differences, 0.5, 0.0)[0]
    assert set(got.patches) == set(own.patches) == {f"diffusion_model.{layer}.weight" for layer in added}
    for layer in added:
        (mine, plain), (expected, _) = patched(comfy, got, layer), patched(comfy, own, layer)
        assert close(mine, expected) and not close(mine, plain), layer


def test_core_reads_less_of_all_others(comfy, models):
    """Else nothing here would be needed."""
    for name in FORMATS.keys() - {"wan kohya", "krea"}:
        family, spelling, places = FORMATS[name]
        state, _ = file_of(models(family), spelling, places)
        known = comfy.lora.model_lora_keys_unet(models(family).model, {})
        found = comfy.lora.load_lora(state, known, log_missing=False)
        assert len(found) < len(places), name


def test_whole_layers_are_equal_to_the_bit_to_core_on_its_own_names(comfy, ours, models):
    family, spelling, places = FORMATS["wan diffusers"]
    model = models(family)
    state, _ = file_of(model, spelling, places)
    renamed = {f"diffusion_model.{places[k[: -len(A[0])]]}{k[-len(A[0]) :]}": value for k, value in state.items()}
    got = ours("hosts.comfyui.loras").applied(model, state, {}, 0.7, print)
    own = comfy.sd.load_lora_for_models(model, None, renamed, 0.7, 0.0)[0]
    for layer in places.values():
        assert torch.equal(patched(comfy, got, layer)[0], patched(comfy, own, layer)[0])


def test_halves_of_h3s_gated_layers_change_places(comfy, ours, models):
    """diffusers has value before gate, the network gate before value."""
    model = models("MiniMaxH3")
    state, added = file_of(model, DEFAULT, {"transformer_blocks.0.ff.net.0.proj": "blocks.0.mlp.fc1"})
    got = ours("hosts.comfyui.loras").applied(model, state, {}, 1.0, print)
    mine, plain = patched(comfy, got, "blocks.0.mlp.fc1")
    first, second = added["blocks.0.mlp.fc1"].chunk(2)
    assert close(mine, plain + torch.cat([second, first]))


def test_keys_of_grouped_queries_lie_behind_all_queries(comfy, ours, models):
    """Lumina 2 has fewer heads of keys than of queries; core looks for them where they would be if it had as many."""
    model = models("Lumina2")
    shape = weight(model, "layers.0.attention.qkv").shape
    assert shape == (512, 256)
    generator = torch.Generator().manual_seed(1)
    state, stem = {}, "transformer.layers.0.attention.to_k"
    down, up = torch.randn(3, 256, generator=generator), torch.randn(128, 3, generator=generator)
    state = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    got = ours("hosts.comfyui.loras").applied(model, state, {}, 1.0, print)
    mine, plain = patched(comfy, got, "layers.0.attention.qkv")
    expected = plain.clone()
    expected[256:384] += up @ down
    assert close(mine, expected)


def test_magnitudes_of_peft_have_the_effect_that_peft_gives_them(comfy, ours, models):
    """Against PEFT's own forward pass; core's dora_scale is over another norm, and stays core's."""
    peft = pytest.importorskip("peft")
    model, layer = models("WAN21_T2V"), "blocks.0.self_attn.q"
    generator = torch.Generator().manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    module[0].weight.data = torch.randn(128, 128, generator=torch.Generator().manual_seed(2))  # as `patched` has it
    module = peft.get_peft_model(module, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True))
    for name, weight in module.named_parameters():
        if "lora_" in name:
            weight.data = torch.rand(weight.shape, generator=generator) + (0.5 if "magnitude" in name else -0.5)
    saved = peft.get_peft_model_state_dict(module)
    stem = "base_model.model.transformer.blocks.0.attn1.to_q"
    state = {key.replace("base_model.model.0", stem): value for key, value in saved.items()}
    assert {f"{stem}.lora_magnitude_vector", f"{stem}.lora_A.weight"} <= {k.removesuffix(".default") for k in state}
    apply, x = ours("hosts.comfyui.loras").applied, torch.randn(5, 128, generator=generator)
    state[f"{stem}.alpha"] = torch.tensor(6.0)
    mine, plain = patched(comfy, apply(model, state, {}, 1.0, print), layer)
    with torch.no_grad():
        assert close(x @ mine.T, module(x))
    half, _ = patched(comfy, apply(model, state, {}, 0.5, print), layer)
    assert close(half, (mine + plain) / 2)
    own = {k.replace(stem, f"diffusion_model.{layer}"): v for k, v in state.items()}
    scale = own.pop(f"diffusion_model.{layer}.lora_magnitude_vector")[:, None]
    own[f"diffusion_model.{layer}.dora_scale"] = scale
    expected = patched(comfy, comfy.sd.load_lora_for_models(model, None, own, 1.0, 0.0)[0], layer)[0]
    assert torch.equal(patched(comfy, apply(model, own, {}, 1.0, print), layer)[0], expected)
    assert not close(mine, expected)
    with pytest.raises(ValueError, match=r"bypass: the LoRA has the magnitudes of a DoRA"):
        apply(model, state, {}, 1.0, print, True)


def test_magnitudes_of_a_part_of_a_layer_act_on_its_rows(comfy, ours, models):
    model, layer = models("HunyuanVideo"), "double_blocks.0.img_attn.qkv"
    stem = "transformer.transformer_blocks.0.attn.to_k"
    state, added = file_of(model, A, {stem: (layer, 1, 3)})
    magnitude = torch.rand(128, generator=torch.Generator().manual_seed(3)) + 0.5
    got = ours("hosts.comfyui.loras").applied(
        model, state | {f"{stem}.lora_magnitude_vector": magnitude}, {}, 1.0, print
    )
    mine, plain = patched(comfy, got, layer)
    expected, both = plain.clone(), (plain + added[layer])[128:256]
    expected[128:256] = magnitude[:, None] * both / both.norm(dim=1, keepdim=True)
    assert close(mine, expected)


def test_alpha_is_read_from_the_metadata_where_the_tensors_lack_it(comfy, ours, models):
    model, layer = models("WAN21_T2V"), "blocks.0.self_attn.q"
    state, added = file_of(model, A, {"transformer.blocks.0.attn1.to_q": layer})
    notes = {"lora_adapter_metadata": '{"transformer.r": 3, "transformer.lora_alpha": 6}'}
    for metadata, scale in ((notes, 2.0), ({}, 1.0), ({"lora_adapter_metadata": "{"}, 1.0)):
        got = ours("hosts.comfyui.loras").applied(model, state, metadata, 1.0, print)
        mine, plain = patched(comfy, got, layer)
        assert close(mine, plain + scale * added[layer])


def test_biases_of_parts_and_other_adapters_of_parts_find_their_rows(comfy, ours, models):
    model = models("HunyuanVideo")
    stem, layer = "transformer.transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv"
    one, two = torch.randn(8, 16), torch.randn(16, 8)
    state = {f"{stem}.lokr_w1": one, f"{stem}.lokr_w2": two, f"{stem}.diff_b": torch.ones(128)}
    got = ours("hosts.comfyui.loras").applied(model, state, {}, 1.0, print)
    mine, plain = patched(comfy, got, layer)
    expected = plain.clone()
    expected[128:256] += torch.kron(one, two)
    assert close(mine, expected)
    key = f"diffusion_model.{layer}.bias"
    bias = comfy.lora.calculate_weight(got.patches[key], torch.zeros(384), key)
    assert torch.equal(bias, torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(128))


@pytest.mark.parametrize("name", ["wan diffusers", "z-image kohya", "h3 originals"])
def test_beside_the_layers_it_does_the_same(comfy, ours, models, name):
    """Bypass: the layers compute what they would with changed weights; parts of a layer are fused."""
    family, spelling, places = FORMATS[name]
    model = models(family)
    state, added = file_of(model, spelling, places)
    got = ours("hosts.comfyui.loras").applied(model, state, {}, 0.5, print, True)
    assert not got.patches
    network = model.model.diffusion_model
    with torch.inference_mode():
        for layer, value in added.items():
            module = network.get_submodule(layer)
            x = torch.randn(2, 5, value.shape[1], generator=torch.Generator().manual_seed(4))
            torch.nn.init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            plain = module(x)
            got.inject_model()
            beside = module(x)
            got.eject_model()
            assert torch.equal(module(x), plain)
            assert torch.allclose(beside, plain + 0.5 * x @ value.flatten(1).T, atol=1e-3), layer


def test_two_loras_beside_the_layers_add_up_and_both_are_taken_off(comfy, ours, models):
    """Core's own second bypass on a layer stays there when it is taken off; whichever loader was the first."""
    model, layer = models("WAN21_T2V"), "blocks.0.self_attn.q"
    apply, module = ours("hosts.comfyui.loras").applied, model.model.diffusion_model.get_submodule(layer)
    state, added = file_of(model, A, {"transformer.blocks.0.attn1.to_q": layer})
    own = {f"diffusion_model.{layer}.{half}.weight": state[f"transformer.blocks.0.attn1.to_q.{half}.weight"]
           for half in ("lora_A", "lora_B")}  # fmt: skip
    first = apply(model, state, {}, 0.5, print, True)
    cores = comfy.sd.load_bypass_lora_for_models(model, None, own, 0.5, 0.0)[0]
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        torch.nn.init.normal_(module.weight, std=0.1)
        torch.nn.init.zeros_(module.bias)
        plain = module(x)
        for before in (first, cores):
            both = apply(before, state, {}, 0.25, print, True)
            assert len(both.injections) == 1 and len(before.injections) == 1
            for got, strength in ((both, 0.75), (before, 0.5), (both, 0.75)):
                got.inject_model()
                beside = module(x)
                got.eject_model()
                assert torch.allclose(beside, plain + strength * x @ added[layer].T, atol=1e-3)
                assert torch.equal(module(x), plain)


def test_what_does_not_fit_is_named_and_nothing_at_all_is_refused(comfy, ours, models):
    model, apply = models("WAN21_T2V"), ours("hosts.comfyui.loras").applied
    good, _ = file_of(model, A, {"transformer.blocks.0.attn2.to_k": "blocks.0.cross_attn.k"})
    bad = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 64),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(64, 2), "nowhere.lora_A.weight": torch.zeros(1, 1),
        "nowhere.lora_B.weight": torch.zeros(1, 1), "emb": torch.zeros(1),
    }  # fmt: skip
    told = []
    patched = apply(model, good | bad, {}, 1.0, told.append)
    assert len(patched.patches) == 1
    (text,) = told
    assert text.startswith("5 tensors of the LoRA are left out")
    assert "'emb': no part of a LoRA" in text and "the model has no such layer" in text
    assert "another size than the model's blocks.0.self_attn.q, (128, 128)" in text
    h3, _ = file_of(models("MiniMaxH3"), DEFAULT, FORMATS["h3 originals"][2])
    with pytest.raises(ValueError, match=r"none of the \d+ tensors of the LoRA, .* belongs to this model .*MiniMax-H3"):
        apply(model, h3, {}, 1.0, print)


def test_rows_in_two_orders_are_refused_by_name(comfy, ours, models):
    """DiffSynth-Studio trains MiniMax-H3 from its maker's files and from ComfyUI's, and saves both under one name."""
    state, _ = file_of(models("MiniMaxH3"), DEFAULT, {"blocks.0.attn.qkv_proj": "blocks.0.attn.qkv_proj"})
    with pytest.raises(ValueError, match="blocks.0.attn.qkv_proj .* rows in two orders: .*retort lora convert"):
        ours("hosts.comfyui.loras").applied(models("MiniMaxH3"), state, {}, 1.0, print)
