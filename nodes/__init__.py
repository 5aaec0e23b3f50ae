"""The nodes: a schema and a few lines each, no maths."""

from __future__ import annotations

from ..hosts.api import ComfyExtension, host, io
from . import (
    compare,
    distilled,
    edit_pairs,
    embedded,
    gaussian,
    jobs,
    load_student,
    lora_grid,
    noise_policy,
    picker,
    plan,
    preference,
    reflection,
    restoration,
    restoration_parts,
    rewards,
    samplers,
    search,
    search_files,
    train_restorer,
    train_reward,
    training,
)

NODES: list[type[io.ComfyNode]] = [
    embedded.RetortEmbeddedModel,
    embedded.RetortDemoPhotograph,
    distilled.RetortDistilledSetup,
    load_student.RetortLoadStudent,
    distilled.RetortDistilledSigmas,
    distilled.RetortDistilledSampler,
    edit_pairs.RetortEditPairs,
    training.RetortTrainDistillation,
    training.RetortTrainFlow,
    training.RetortFewShotAdapt,
    train_reward.RetortTrainReward,
    train_restorer.RetortTrainRestorer,
    plan.RetortTrainingPlan,
    jobs.RetortTrainingJob,
    jobs.RetortCollectJob,
    jobs.RetortLossChart,
    lora_grid.RetortLoraGrid,
    rewards.RetortReward,
    rewards.RetortCombineRewards,
    rewards.RetortScoreImages,
    compare.RetortCompareModels,
    preference.RetortPreferenceSet,
    preference.RetortLabelPairs,
    preference.RetortTrainPreference,
    picker.RetortPreferencePicker,
    picker.RetortPromptQueue,
    compare.RetortBlindTest,
    search.RetortTreeSearch,
    search.RetortResumeSearch,
    search_files.RetortSaveSearch,
    search_files.RetortLoadSearch,
    search_files.RetortDrawFromSearch,
    noise_policy.RetortNoisePolicy,
    noise_policy.RetortPolicyNoise,
    gaussian.RetortGaussianStatistics,
    gaussian.RetortLoadGaussianStatistics,
    samplers.RetortTeleportSampler,
    samplers.RetortStudentTNoise,
    samplers.RetortStructureSampler,
    samplers.RetortDopri5Sampler,
    reflection.RetortReflectionSampler,
    reflection.RetortReflectionSetup,
    reflection.RetortReflectionCompare,
    restoration.RetortRestore,
    restoration.RetortCaption,
    restoration_parts.RetortDegrade,
    restoration_parts.RetortColorFix,
    restoration_parts.RetortCompareImages,
    restoration_parts.RetortSpectralGuidance,
]


class RetortExtension(ComfyExtension):
    """What ComfyUI, or the headless host, asks for our nodes."""

    async def on_load(self) -> None:
        host.add_model_folders()
        host.add_routes(preference.sets_folder)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
