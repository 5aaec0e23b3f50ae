"""Edit models: each sample is trained beside its own reference, and searches pass references through, on tiny Flux."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, module = tiny.files, tiny.loaded, tiny.host, tiny.module
STEPS = 4


def shown(count):
    return [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(20 + i)) for i in range(count)]


def after(count):
    return [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def given(ours, positive, count=2, losers=False):
    entry = tuple(positive[0])
    empty = (entry[0] * 0, entry[1])
    pairs = {"losers": after(2 * count)[count:], "strengths": [1.0] * count} if losers else {}
    return ours("trainers.dataset").Dataset([entry] * count, [], empty, after(count), references=shown(count), **pairs)


@pytest.fixture
def denoiser(host, loaded):
    with host.training_session():
        made = host.trainable(loaded("flux")[0])
        made.place(0)
        yield made
        made.release()


def test_each_sample_has_its_own_reference_in_its_prompt_and_in_the_empty_one(ours, loaded, denoiser):
    """x0 of a batch is, sample by sample, what the network makes beside that sample's reference alone."""
    positive = loaded("flux")[1]
    data = ours("hosts.training.assembly").encode(denoiser, given(ours, positive))
    batch = data.batch(denoiser, [1, 0], [0, 1], 7, 0, 0.0)
    x, sigma = torch.stack(after(2)), torch.tensor([0.5, 0.7])
    tokens, extra = positive[0]
    with torch.no_grad():
        together = denoiser.predict_x0(x, sigma, batch.cond)
        without = denoiser.predict_x0(x, sigma, batch.uncond)
        for row, sample in enumerate((1, 0)):
            for found, words in ((together, tokens), (without, tokens * 0)):
                told = [[words, {**extra, "reference_latents": [shown(2)[sample][None]]}]]
                cond = denoiser.join([denoiser.encode(told, (1, 16, 8, 8))])
                alone = denoiser.predict_x0(x[row : row + 1], sigma[row : row + 1], cond)
                assert torch.allclose(found[row : row + 1], alone, atol=1e-4)
        plain = denoiser.predict_x0(x, sigma, denoiser.join([denoiser.encode(positive, (1, 16, 8, 8))] * 2))
    assert (together - plain).abs().amax((1, 2, 3)).min() > 1e-3
    dropped = data.batch(denoiser, [1, 0], [0, 1], 7, 0, 1.0)
    with torch.no_grad():
        assert torch.equal(denoiser.predict_x0(x, sigma, dropped.cond), without)


def test_references_of_unlike_sizes_train_in_one_batch(ours, loaded, denoiser):
    positive = loaded("flux")[1]
    dataset = given(ours, positive)
    dataset.references = [dataset.references[0], torch.randn(16, 4, 12)]
    data = ours("hosts.training.assembly").encode(denoiser, dataset)
    batch = data.batch(denoiser, [0, 1], [0, 1], 7, 0, 0.0)
    with torch.no_grad():
        assert torch.isfinite(denoiser.predict_x0(torch.stack(after(2)), torch.tensor([0.5, 0.7]), batch.cond)).all()


@pytest.mark.parametrize("where", ["references", "conditioning"])
def test_a_reference_of_another_size_is_counted_anew(ours, host, loaded, where, tmp_path):
    """Not remembered from a smaller one; and the largest is counted, whichever sample has it."""
    planning = ours("hosts.training.planning")
    model, positive = loaded("flux")
    settings = {"method": "flow", "training": {"batch_size": 1}, "lora": {"rank": 4}}
    config = ours("trainers.methods").read_config(settings)

    def counted(*sides, remembered=None):
        tokens, extra = positive[0]
        shown = [torch.zeros(16, side, side) for side in sides]
        if where == "references":
            entries, beside = [(tokens, extra)] * len(sides), {"references": shown}
        else:
            entries, beside = [(tokens, {**extra, "reference_latents": [one[None]]}) for one in shown], {}
        dataset = ours("trainers.dataset").Dataset(entries, [], (tokens * 0, extra), after(len(sides)), **beside)
        return planning.counted(host, model, config, dataset, remembered=remembered)

    known = tmp_path / "counted.json"
    small, large = (counted(side, remembered=known) for side in (8, 64))
    assert large.beside > 4 * small.beside and counted(64) == large and counted(8, 64, 8).beside >= large.beside
    assert counted(8, remembered=known) == small and counted(64, remembered=known) == large


@pytest.mark.parametrize("method", ["flow", "dmd2", "dpo"])
def test_it_trains_and_core_reads_the_lora(ours, host, loaded, method, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")
    model, positive = loaded("flux")
    training = {"steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 2, "previews": 2}
    objective = {"ratio": 1} if method == "dmd2" else {}
    config = {"method": method, "objective": objective, "training": training, "lora": {"rank": 2}}
    config = ours("trainers.methods").read_config(config)
    request = ours("hosts.training.run").Request(method, config, given(ours, positive, losers=method == "dpo"))
    with torch.inference_mode():
        result = ours("hosts.training.run").run(
            host, model, request, watcher=ours("trainers.watch").Silent(), folder=tmp_path / method
        )
    assert result.path.is_file() and result.steps == 2


def test_a_model_that_is_shown_nothing_says_so(ours, host, loaded):
    model, positive = loaded("sd3")
    with host.training_session():
        made = host.trainable(model)
        with pytest.raises(ValueError, match="takes no notice: load an edit model"):
            ours("hosts.training.assembly").encode(made, given(ours, positive))
        made.release()


def test_searches_pass_references_through(comfy, ours, host, loaded):
    """One candidate is core's euler_ancestral with the same references, to the bit, and without them it is another."""
    model, positive = loaded("flux")
    nodes = ours("nodes.search")
    reward = ours("hosts.rewards.kinds").make(host, "sharpness", {})
    told = [[tokens, {**extra, "reference_latents": [shown(1)[0][None]]}] for tokens, extra in positive]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)

    class FirstThree:
        def decode(self, samples):
            return samples[:, :3].movedim(1, -1).sigmoid()

    found = []
    with torch.inference_mode():
        for words in (told, positive):
            guider = comfy.custom.BasicGuider.execute(model, words)[0]
            empty = {"samples": torch.zeros(1, 16, 8, 8)}
            how = {"method": "best_of_n"}
            best = nodes.RetortTreeSearch.execute(
                guider, sigmas, empty, FirstThree(), reward, how, calls=STEPS, seed=3
            ).args[0]["samples"]
            plain = comfy.samplers.sampler_object("euler_ancestral")
            noise = comfy.custom.Noise_RandomNoise(3)
            core = comfy.custom.SamplerCustomAdvanced.execute(noise, guider, plain, sigmas, empty)[0]["samples"]
            assert torch.equal(best, core)
            found.append(best)
    assert (found[0] - found[1]).abs().max() > 1e-3
