"""The embedded model on the headless host: loaders, LoRAs, overhead and threads."""

from __future__ import annotations

import time

import pytest
import torch

from retort.files.errors import NodeError, UsageError
from retort.hosts.headless import embedded, folders
from retort.hosts.headless.guider import Guider
from retort.hosts.headless.samplers import StandardSampler
from retort.hosts.headless.threads import quickest, threads
from retort.sampling.grids import simple

HERE = all((folders.EMBEDDED / name).is_file() for name in embedded.FILES)
needs_weights = pytest.mark.skipif(not HERE, reason="the embedded weights are not built")


class Nothing:
    """A network that costs nothing, so that what remains is the loop around it."""

    device, repeats_context = torch.device("cpu"), False

    def conditions(self, tokens, extra, shape):
        return {"context": tokens, "y": extra["pooled_output"]}

    def __call__(self, x, timestep, **conditions):
        return x


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_a_step_costs_little_beside_its_network(tiny, kind, slowness):
    """A forward of the embedded network takes 8 ms at least, and a step may cost 5 % on top: 400 microseconds."""
    t = tiny(kind)
    t.model.source._loaded[()] = Nothing()
    guider = Guider(t.model, t.clip.encode("one"), t.clip.encode(""), 3.0)
    noise, sigmas = torch.randn(1, 4, 8, 8), simple(t.model.schedule, 50)

    def step() -> float:
        began = time.process_time()
        guider.sample(noise, torch.zeros_like(noise), StandardSampler("euler"), sigmas, seed=1)
        return (time.process_time() - began) / 50

    assert min(step() for _ in range(20)) < 400e-6 * slowness


def test_the_quicker_number_of_threads_is_taken():
    def slow_together():
        time.sleep(0.02 if torch.get_num_threads() > 1 else 0.001)

    def slow_alone():
        time.sleep(0.001 if torch.get_num_threads() > 1 else 0.02)

    with threads(2):
        assert (quickest(slow_together), quickest(slow_alone), torch.get_num_threads()) == (1, 2, 2)
    assert torch.get_num_threads() == 1 and quickest(slow_together) == 1


def test_an_unknown_variant_and_foreign_conditions_are_refused(tiny):
    with pytest.raises(ValueError, match="variant 'blue' is not known"):
        embedded.load("blue")
    network = embedded.EmbeddedNetwork(torch.nn.Linear(1, 1))
    tokens, extra = tiny("eps").clip.encode("one")[0]
    with pytest.raises(UsageError, match="use the CLIP of RetortEmbeddedModel"):
        network.conditions(tokens, extra, torch.Size((1, 16, 8, 8)))


def stock(**changes) -> dict:
    """Core nodes on the embedded flow checkpoint, the CLIP from our own node."""
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "digits_flow.safetensors"}},
        "8": {"class_type": "RetortEmbeddedModel", "inputs": {"variant": "flow"}},
        "9": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["1", 0], "lora_name": "digits_flow_dmd2_1step.safetensors", "strength_model": 1.0},
        },
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a blue seven on yellow paper", "clip": ["8", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["9", 0], "seed": 5, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
                "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["4", 0], "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "digit"}},
    }  # fmt: skip
    for id, inputs in changes.items():
        graph[id.removeprefix("n")]["inputs"] |= inputs
    return graph


@needs_weights
def test_core_loaders_find_the_embedded_files(go):
    pytest.importorskip("diffusers")

    def image(**changes):
        return go(stock(**changes), keep={"6"}).results.outputs["6"][0][0]

    with_lora = image()
    assert with_lora.shape == (1, 64, 64, 3) and with_lora.std() > 0.05
    # Yellow paper, read at the corners: red and green bright, blue dark.
    corner = with_lora[0, :6, :6].mean((0, 1))
    assert corner[0] > 0.7 and corner[1] > 0.5 and corner[2] < 0.4
    without = image(n9={"strength_model": 0.0})
    assert torch.equal(without, image(n5={"model": ["1", 0]})) and (without - with_lora).abs().max() > 0.05


@needs_weights
def test_a_lora_that_was_just_trained_is_the_lora_of_its_file(where):
    pytest.importorskip("diffusers")
    from retort.graphs.core.loaders import LoraLoaderModelOnly, LoraModelLoader
    from retort.hosts.headless.host import host

    model, _, _ = embedded.load("flow")
    name = "digits_flow_dmd2_1step.safetensors"
    file = LoraLoaderModelOnly.execute(model, name, 0.7).args[0]
    made = LoraModelLoader.execute(model, host.read_lora(name), 0.7, True).args[0]
    inputs = torch.randn(1, 16, 8, 8), torch.tensor([500.0])
    told = {"context": torch.zeros(1, 4, 128), "y": torch.zeros(1, 128)}
    assert torch.equal(file.network(*inputs, **told), made.network(*inputs, **told))
    assert LoraModelLoader.execute(model, {}, 0.0).args[0] is model
    # A job is told of files by name, and this is in none.
    assert host.describe_base(file) is not None and host.describe_base(made) is None
    with pytest.raises(ValueError, match="a LoRA that is in no file"):
        host.merge_base(made, where.output, "base.safetensors")


@needs_weights
def test_a_latent_of_usual_size_is_refused_with_the_size_to_take(go):
    with pytest.raises(NodeError, match="are 768 x 512: set width and height .* to 64"):
        go(stock(n4={"width": 768, "height": 512}))


@needs_weights
def test_the_stock_loaders_missing_clip_is_explained(go):
    with pytest.raises(NodeError, match='node 2 "CLIPTextEncode": the checkpoint that this CLIP comes from holds no'):
        go(stock(n2={"clip": ["1", 1]}))


@needs_weights
def test_a_lora_of_another_model_is_the_lora_nodes_error(go, where):
    import safetensors.torch

    (where.models[0] / "loras").mkdir()
    state = {"diffusion_model.x.lora_A.weight": torch.zeros(2, 4), "diffusion_model.x.lora_B.weight": torch.zeros(4, 2)}
    safetensors.torch.save_file(state, where.models[0] / "loras" / "other.safetensors")
    with pytest.raises(NodeError, match='node 9 "LoraLoaderModelOnly": the LoRA has 1 layers that this model lacks'):
        go(stock(n9={"lora_name": "other.safetensors"}))
