"""The list of samplers, from which the UI and a generation take theirs."""

from modules import sd_samplers_common, sd_samplers_kdiffusion


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


all_samplers = [
    sd_samplers_common.SamplerData(
        "Euler", lambda model: sd_samplers_kdiffusion.KDiffusionSampler(euler, model), ["k_euler"], {}
    )
]
all_samplers_map = {sampler.name: sampler for sampler in all_samplers}
samplers_map = {}


def set_samplers():
    samplers_map.clear()
    for sampler in all_samplers:
        for name in (sampler.name, *sampler.aliases):
            samplers_map[name.lower()] = sampler.name


def create_sampler(name, model):
    sampler = all_samplers_map[name].constructor(model)
    sampler.config = all_samplers_map[name]
    return sampler


set_samplers()
