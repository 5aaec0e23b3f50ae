"""The nodes: a schema and a few lines each, no maths."""

from __future__ import annotations

from ..hosts.api import ComfyExtension, host, io
from . import distilled, embedded, jobs, preference, rewards, search, training

NODES: list[type[io.ComfyNode]] = [
    embedded.RetortEmbeddedModel,
    distilled.RetortDistilledSetup,
    distilled.RetortDistilledSigmas,
    distilled.RetortDistilledSampler,
    training.RetortTrainDistillation,
    training.RetortTrainFlow,
    training.RetortFewShotAdapt,
    jobs.RetortTrainingJob,
    jobs.RetortCollectJob,
    jobs.RetortLossChart,
    rewards.RetortReward,
    rewards.RetortCombineRewards,
    rewards.RetortScoreImages,
    preference.RetortPreferenceSet,
    preference.RetortLabelPairs,
    preference.RetortTrainPreference,
    search.RetortTreeSearch,
    search.RetortResumeSearch,
]


class RetortExtension(ComfyExtension):
    """What ComfyUI, or the headless host, asks for our nodes."""

    async def on_load(self) -> None:
        host.add_model_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
