"""What trainings take in memory at true size, counted before a weight is there: the table of RESULTS.md and of CI.

`python -m retort.benchmarks.memory_table --comfyui DIR [--only TEXT] [--whole] [--write]`, in ComfyUI's environment,
counts ComfyUI's own classes at their published sizes; without --comfyui it counts diffusers' classes of SDXL,
SD3.5-medium and Flux.1, as CI does. No weights, no GPU, some seconds a row. --whole counts whole networks besides, with
which shallow copies are compared. --write keeps the counts in `memory.json` and the tables of RESULTS.md and
docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..hosts.contract import Host
from ..trainers.counted import Counted
from ..trainers.planning import ALONE, CONTEXT, MEASURES, Forecast
from .layouts import BF16, FP8, HALF, TRUE, Layout
from .report import RESULTS, put

# Earlier calls of a student of four steps, in the mean of the steps that are trained.
EARLIER = 1.5
KEPT = Path(__file__).with_name("memory.json")
TRAINING = RESULTS.parents[1] / "docs" / "training.md"
CARDS = (8, 12, 16, 24)
GB = 2**30
CHANGE = 0.02  # of a peak, beyond which CI fails
LEAN = MEASURES[-1]

_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "out_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 256,
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16,
}  # fmt: skip
_FLUX = TRUE["Flux fp8"]


def _flux2(width: int, double: int, single: int, text: int) -> Layout:
    config = {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": text,
        "hidden_size": width, "mlp_ratio": 3.0, "num_heads": width // 128, "depth": double,
        "depth_single_blocks": single, "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False,
        "guidance_embed": False, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True,
        "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0, "yak_mlp": False, "txt_norm": False,
    }  # fmt: skip
    return Layout("Flux2", config, (128, 64, 64), (512, text), stored=BF16)


_QWEN = Layout(
    "QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}, (16, 1, 128, 128), (256, 3584),
    stored=BF16,
)  # fmt: skip
# One of Wan 2.2's two networks is of the same class and size as Wan 2.1's.
_WAN_14B = Layout(
    "WAN21_T2V", {**_WAN, "dim": 5120, "num_heads": 40, "ffn_dim": 13824, "num_layers": 40}, (16, 21, 60, 104),
    (512, 4096), stored=HALF,
)  # fmt: skip
# Batch 1; 1024 x 1024 pixels, videos of 832 x 480. Prompts are as long as the family's text encoders make them.
NETWORKS: dict[str, Layout] = {
    "SDXL": TRUE["SDXL"],
    "SD3.5-medium": Layout(
        "SD3",
        {
            "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 24,
            "adm_in_channels": 2048, "num_patches": 147456, "pos_embed_max_size": 384, "qk_norm": "rms",
            "pos_embed_scaling_factor": None, "x_block_self_attn_layers": list(range(13)),
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536},
            },
        },
        (16, 128, 128), (154, 4096), 2048, {}, HALF,
    ),
    "Z-Image": replace(TRUE["Z-Image"], text=(256, 2560)),
    "Z-Image fp8": replace(TRUE["Z-Image"], text=(256, 2560), stored=FP8, loaded=FP8),
    "Flux.1": replace(_FLUX, text=(512, 4096), stored=BF16, loaded=None),
    "Flux.1 fp8": replace(_FLUX, text=(512, 4096)),
    "FLUX.2 klein 4B": _flux2(3072, 5, 20, 7680),
    "FLUX.2 klein 9B": _flux2(4096, 8, 24, 12288),
    "Qwen-Image": _QWEN,
    "Qwen-Image fp8": replace(_QWEN, stored=FP8, loaded=FP8),
    "Wan 2.1 1.3B, 33 frames": Layout(
        "WAN21_T2V", {**_WAN, "dim": 1536, "num_heads": 12, "ffn_dim": 8960, "num_layers": 30}, (16, 9, 60, 104),
        (512, 4096), stored=HALF,
    ),
    "Wan 2.1 14B, 81 frames": _WAN_14B,
    "Wan 2.2 14B fp8, 33 frames": replace(_WAN_14B, latent=(16, 9, 60, 104), stored=FP8, loaded=FP8),
}  # fmt: skip
# Settings that decide memory; the rest are the nodes' own. A step in which every player moves.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("flow", {}),
    "dmd2": ("dmd2", {"steps": 4, "ratio": 1}),
    "tdm": ("tdm", {"steps": 4}),
    "dpo": ("dpo", {}),
}
# Counted on whole networks: a discriminator looks at a share of the depth.
GAN, F_DISTILL = "dmd2 + GAN", "f_distill"
# Through SDXL's decoder and a CLIP ViT-H/14 in fp32, as rewards load it.
ALIGN = "align_prop, ViT-H"
MORE_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    GAN: ("dmd2", {"steps": 4, "ratio": 1, "gan_weight": 5e-3}),
    F_DISTILL: ("f_distill", {"steps": 4, "ratio": 1}),
    ALIGN: ("align_prop", {"steps": 20, "last": 1, "truncation": "fixed"}),
    **{name: (name, {}) for name in ("smpo", "mapo", "spo", "flow_grpo", "few_shot", "instarevive")},
    "di_star": ("di_star", {"steps": 4}),
}
# On one network of each prediction; rewards that are asked without a gradient take memory of their own only.
ELSEWHERE = {
    "SDXL": ("smpo", "mapo", "spo", "few_shot", "di_star", "instarevive"),
    "Z-Image": ("smpo", "mapo", "flow_grpo", "few_shot", "di_star", "instarevive"),
}
# diffusers' own classes, for where there is no ComfyUI.
DIFFUSERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, int], int]] = {
    "SDXL": ("SDXL", {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2816,
    }, (4, 128, 128), (77, 2048), 1280),
    "Flux.1": ("FLUX", {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }, (16, 128, 128), (512, 4096), 768),
    "SD3.5-medium": ("SD3", {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    }, (16, 128, 128), (154, 4096), 2048),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One network by one method. host: the kind of its classes, "comfyui" or "diffusers"."""

    host: str
    network: str
    method: str
    rank: int = 16
    optimiser: str = "adamw"

    def __str__(self) -> str:
        more = [f"rank {self.rank}"] if self.rank != 16 else []
        more += [self.optimiser] if self.optimiser != "adamw" else []
        return ", ".join([f"{self.host}: {self.network}, {self.method}", *more])


def rows(host: str) -> list[Row]:
    """What is counted with ComfyUI's classes, or in CI with diffusers'."""
    if host == "diffusers":
        # DMD2's fake score learns by flow matching, so its row holds flow matching's passes too.
        return [Row(host, n, m) for n, m in (("SDXL", "flow"), ("Flux.1", "dmd2"), ("SD3.5-medium", "dpo"))]
    found = [Row(host, network, method) for network in NETWORKS for method in METHODS]
    more = [Row(host, "SDXL", "dmd2", 64), Row(host, "SDXL", ALIGN)]
    more += [Row(host, network, method) for network in ("SDXL", "Flux.1 fp8") for method in (GAN, F_DISTILL)]
    more += [Row(host, network, method) for network, methods in ELSEWHERE.items() for method in methods]
    return [*found, *more, *(Row(host, n, "dmd2", optimiser="adamw8bit") for n in ("Flux.1", "Qwen-Image"))]


def _request(row: Row, latent: tuple[int, ...], text: tuple[int, int], pooled: int, extra: Mapping[str, Any]) -> Any:
    from ..trainers.dataset import Dataset
    from ..trainers.methods import METHODS as known
    from ..trainers.methods import read_config

    method, objective = (METHODS | MORE_METHODS)[row.method]
    training = {"batch_size": 1, "gradient_checkpointing": True, "optimiser": row.optimiser}
    config = read_config({
        "method": method, "objective": objective, "training": training, "lora": {"rank": row.rank},
    })  # fmt: skip
    more = {**extra, **({"pooled_output": torch.zeros(1, pooled)} if pooled else {})}
    entry = torch.zeros(1, *text), more
    picture = [torch.zeros(latent)]
    needs = known[method].objective.needs
    losers: dict[str, Any] = {"losers": picture, "strengths": [1.0]} if "comparisons" in needs else {}
    if "pictures" in needs:
        losers["pictures"] = [torch.zeros(*(8 * side for side in latent[-2:]), 3, dtype=torch.uint8)]
    return config, Dataset([entry], ["a prompt"], entry, picture, **losers)


def count(row: Row, measures: tuple[str, ...] = (), whole: bool = False) -> Counted:
    """What a step of it takes."""
    from ..hosts.training import planning

    if row.host == "diffusers":
        from ..hosts.headless import families
        from ..hosts.headless.host import host as headless

        host: Host = headless
        name, config, latent, text, pooled = DIFFUSERS[row.network]
        family = getattr(families, name)
        schedule, path, prediction = families.coordinates(family, {}, config)
        model: Any = families.as_model(
            family, None, schedule, path, prediction, lambda: families.bare_module(family, config)
        )
        extra: Mapping[str, Any] = {}
    else:
        from ..hosts.comfyui import bare
        from ..hosts.comfyui.host import host as comfyui

        host, layout = comfyui, NETWORKS[row.network]
        latent, text, pooled, extra = layout.latent, layout.text, layout.pooled, layout.extra
        import comfy.supported_models as known

        model = bare.model_of(getattr(known, layout.kind)(dict(layout.config)), layout.loaded or layout.stored)
    settings, dataset = _request(row, latent, text, pooled, extra)
    judged: dict[str, Any] = {}
    if row.method == ALIGN:
        from . import memory_reward

        judged = {"vae": memory_reward.sdxl_vae(), "rewards": [memory_reward.vit_h()]}
    else:
        from ..hosts.training import plan_report

        judged = dict(zip(("vae", "rewards"), plan_report.stand_ins(host, settings), strict=True))
    found = planning.counted(host, model, settings, dataset, **judged, compute=BF16, measures=measures, whole=whole)
    return replace(found, peaks=found.phases())


def _waits(row: Row) -> bool:
    from ..trainers.methods import METHODS as known
    from ..trainers.methods import read_config

    method, objective = (METHODS | MORE_METHODS)[row.method]
    return known[method].objective.graphs_wait(read_config({"method": method, "objective": objective}).objective)


# ---- what is kept ------------------------------------------------------------------------------------


def read() -> dict[str, dict[str, Counted]]:
    """The committed counts: by row, "plain", with one graph at a time, "alone", and with what may wait in host memory,
    "lean".
    """
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    return {
        row: {name: Counted(**{**one, "blocks": tuple(one["blocks"])}) for name, one in counts.items()}
        for row, counts in kept.items()
    }


def write(counts: Mapping[str, Mapping[str, Counted]]) -> None:
    """Keep counts, a row in each line."""
    rows = {row: {name: asdict(one) for name, one in both.items()} for row, both in sorted(counts.items())}
    text = ",\n".join(f"{json.dumps(row)}: {json.dumps(both)}" for row, both in rows.items())
    KEPT.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def changed(old: Counted, new: Counted) -> list[str]:
    """Peaks that differ by more than CHANGE, resident and with every block streamed."""
    found = []
    for name, streamed in (("resident", 0), ("streamed", len(new.blocks))):
        before, now = (_peak(one, streamed) for one in (old, new))
        if abs(now - before) > CHANGE * before:
            found.append(f"{name}: {before / GB:.2f} -> {now / GB:.2f} GB")
    return found


def _peak(counted: Counted, streamed: int) -> int:
    from ..trainers.config import TrainingConfig

    return Forecast(counted, TrainingConfig(gradient_checkpointing=True), context=CONTEXT).peak(streamed)


# ---- tables ------------------------------------------------------------------------------------------


def _plans(both: Mapping[str, Counted]) -> list[Any]:
    from ..trainers.config import TrainingConfig
    from ..trainers.planning import on_cards

    training = TrainingConfig(gradient_checkpointing=True)
    more = tuple((name, both[key]) for key, name in (("alone", (ALONE,)), ("lean", LEAN)) if key in both)
    return [plan for _, plan in on_cards(both["plain"], training, CARDS, more)]


def table(counts: Mapping[str, Mapping[str, Counted]]) -> str:
    """Model x method: peaks, and on each card how many blocks are streamed."""
    lines = [
        "| model | method | base | resident | all streamed | and idle parts in host memory | "
        + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "|---" * (6 + len(CARDS)) + "|",
    ]  # fmt: skip
    for row in rows("comfyui"):
        both = counts.get(str(row))
        if both is None:
            continue
        plain = both["plain"]
        sizes = [plain.base, _peak(plain, 0), _peak(plain, len(plain.blocks))]
        lean = f"{_peak(both['lean'], len(plain.blocks)) / GB:.2f}" if "lean" in both else ""
        method = str(row).partition(f"{row.network}, ")[2]
        cells = [_cell(plan) for plan in _plans(both)]
        numbers = [f"{size / GB:.2f}" for size in sizes]
        lines.append(f"| {row.network} | {method} | {' | '.join([*numbers, lean, *cells])} |")
    return "\n".join(lines)


def _cell(plan: Any) -> str:
    if not plan.fits:
        return "no"
    text = f"{plan.streamed} of {plan.blocks}" if plan.streamed else "resident"
    if plan.measures:
        text += ", one graph" if plan.measures == (ALONE,) else ", lean"
    return text


def work(counts: Mapping[str, Mapping[str, Counted]]) -> str:
    """Model x method: operations of a step over those of a plain one, in the mean of what draws decide."""
    methods = [*METHODS, GAN, F_DISTILL, ALIGN][1:]
    lines = [f"| model | TFLOP of a plain step, a forward pass's share | {' | '.join(methods)} |",
             "|---" * (2 + len(methods)) + "|"]  # fmt: skip
    for network in NETWORKS:
        plain = counts.get(str(Row("comfyui", network, "flow")))
        if plain is None:
            continue
        whole = plain["plain"].operations
        cells = [f"{whole / 1e12:.0f}, {plain['plain'].flops['student forward'] / whole:.3f}"]
        for method in methods:
            both = counts.get(str(Row("comfyui", network, method)))
            cells.append("" if both is None else f"{mean_work(both['plain'], method) / whole:.2f}")
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_work(counted: Counted, method: str) -> float:
    """Operations of a step; of a few-step student's, with as many earlier calls as it has in the mean."""
    if (METHODS | MORE_METHODS)[method][1].get("steps") != 4:
        return counted.operations
    one = counted.flops["student forward"] / counted.calls["student forward"]
    return counted.operations - counted.flops.get("student pass", 0) + EARLIER * one


def cards(counts: Mapping[str, Mapping[str, Counted]]) -> str:
    """A line for each card: what trains on it, by which methods."""
    lines = ["| card | trains (batch 1, rank 16, 1024 x 1024 pixels, gradient_checkpointing) |", "|---|---|"]
    for place, card in enumerate(CARDS):
        parts = []
        for network in NETWORKS:
            able = [
                method for method in METHODS
                if (both := counts.get(str(Row("comfyui", network, method)))) and _plans(both)[place].fits
            ]  # fmt: skip
            known = [method for method in METHODS if str(Row("comfyui", network, method)) in counts]
            if able:
                parts.append(network if able == known else f"{network} ({', '.join(able)})")
        lines.append(f"| {card} GB | {'; '.join(parts) or 'none'} |")
    return "\n".join(lines)


def main(argv: Iterable[str] | None = None) -> int:
    """Count, compare with what is kept, and write it anew where that is wished."""
    parser = argparse.ArgumentParser(prog="memory_table", description=__doc__.partition("\n")[0])
    parser.add_argument("--comfyui", type=Path, help="folder of ComfyUI, whose classes are counted")
    parser.add_argument("--only", default="", help="count rows with this text alone")
    parser.add_argument("--whole", action="store_true", help="count whole networks and compare with shallow copies")
    parser.add_argument("--write", action="store_true", help="keep the counts and write the tables")
    given = parser.parse_args(None if argv is None else list(argv))
    if given.comfyui:
        from ..hosts.job import enter_comfyui

        enter_comfyui(given.comfyui, None, [], ["--cpu"])
    console, kept, worst = Console(soft_wrap=True), read(), 0
    for row in rows("comfyui" if given.comfyui else "diffusers"):
        if given.only not in str(row):
            continue
        began = time.process_time()
        both = {"plain": count(row)}
        if given.comfyui and not given.whole and _waits(row) and _plans(both)[0].streamed:
            both["alone"] = count(row, (ALONE,))
        aimed = row.optimiser != "adamw"  # aims are set for these with idle parts in host memory
        if given.comfyui and not given.whole and (aimed or not _plans(both)[0].fits):
            both["lean"] = count(row, LEAN)  # where streaming alone does not do on the smallest card
        seconds = time.process_time() - began
        streamed = len(both["plain"].blocks)
        said = f"{row}: resident {_peak(both['plain'], 0) / GB:.2f}, streamed {_peak(both['plain'], streamed) / GB:.2f}"
        if "alone" in both:
            said += f", one graph {_peak(both['alone'], 0) / GB:.2f}, {_peak(both['alone'], streamed) / GB:.2f}"
        if "lean" in both:
            said += f", lean {_peak(both['lean'], streamed) / GB:.2f}"
        if given.whole:
            truth = count(row, whole=True)
            said += "".join(
                f"; {name}, quick over whole {_peak(both['plain'], n) / _peak(truth, n):.3f}"
                for name, n in (("resident", 0), ("streamed", streamed))
            )
        differences = changed(kept[str(row)]["plain"], both["plain"]) if str(row) in kept else []
        worst += len(differences)
        console.print(f"{said} GB, {both['plain'].operations / 1e12:.0f} TFLOP, {seconds:.0f} s {differences or ''}",
                      markup=False, highlight=False)  # fmt: skip
        if given.write:
            kept[str(row)] = both
            write(kept)
    if given.write and given.comfyui:
        put(RESULTS, "memory", table(kept))
        put(RESULTS, "work", work(kept))
        put(TRAINING, "cards", cards(kept))
    return 1 if worst and not given.write else 0


if __name__ == "__main__":
    sys.exit(main())
