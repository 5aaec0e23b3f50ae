"""The search nodes as a workflow runs them."""

from __future__ import annotations

import pytest

from retort.nodes.search import METHODS


def step(name, /, **inputs):
    return {"class_type": name, "inputs": inputs}


@pytest.mark.parametrize("method", ["dts_star", "best_of_n"])
def test_a_workflow_searches_and_goes_on(go, method):
    settings = {f"method.{i.id}": i.default for i in METHODS[method]()}
    limits = {"calls": 12, "seconds": 0.0, "enough": "", "batch_size": 4}
    outcome = go(
        {
            "m": step("TinyLoader", kind="eps"),
            "p": step("CLIPTextEncode", clip=["m", 1], text="a seven"),
            "n": step("CLIPTextEncode", clip=["m", 1], text=""),
            "g": step("CFGGuider", model=["m", 0], positive=["p", 0], negative=["n", 0], cfg=2.0),
            "s": step("BasicScheduler", model=["m", 0], scheduler="simple", steps=3, denoise=1.0),
            "l": step("EmptyLatentImage", width=64, height=64, batch_size=2),
            "r": step("RetortReward", kind="colourfulness"),
            "t": step(
                "RetortTreeSearch", guider=["g", 0], sigmas=["s", 0], latent=["l", 0], vae=["m", 2], reward=["r", 0],
                prompt="a seven", method=method, transition="auto", noise_level=0.7, keep=3, seed=1, **settings,
                **limits,
            ),
            "u": step(
                "RetortResumeSearch", search=["t", 2], guider=["g", 0], vae=["m", 2], reward=["r", 0], **limits
            ),
            "d": step("VAEDecode", samples=["u", 0], vae=["m", 2]),
            "o": step("SaveImage", images=["d", 0], filename_prefix="found"),
        }
    )  # fmt: skip
    assert len([path for path in outcome.saved if path.name.startswith("found")]) == 2
