"""Runs a validated graph: each node once, sources first, equal nodes once, results dropped after their last use."""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from ..files.errors import NodeError
from ..hosts.headless import progress
from .api.schema import ComfyNode, ExecutionBlocker, Hidden, HiddenHolder, NodeOutput, Schema
from .dynamic import fold
from .graph import Graph, Link, Node
from .registry import Registry

Values = list[list[Any]]  # per output, the list of items that later nodes run through; usually of one item


@dataclass
class Results:
    """What a run left: outputs of the nodes that were to be kept, what nodes showed, seconds per node."""

    outputs: dict[str, Values] = field(default_factory=dict)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


async def execute(graph: Graph, order: list[str], registry: Registry, keep: Collection[str] = ()) -> Results:
    """Run the nodes of `order` (see `validate`). keep: ids whose outputs the caller wants.

    Raises NodeError for whatever goes wrong inside a node; the cause is chained.
    """
    results = Results()
    values: dict[str, Values] = {}
    same = _twins(graph, order, registry)
    run_order = [id for id in order if same[id] == id]
    waiting = dict.fromkeys(run_order, 0)
    for id in run_order:
        for link in _links(graph.nodes[id]):
            waiting[same[link.node]] += 1
    prompt = graph.prompt()
    for i, id in enumerate(run_order):
        node = graph.nodes[id]
        schema = registry.schema(node)
        progress.node(i, len(run_order), node.title)
        start = time.perf_counter()
        given = {
            name: values[same[value.node]][value.slot] if isinstance(value, Link) else [value]
            for name, value in node.inputs.items()
        }
        hidden = _hidden(node, schema, graph, prompt)
        values[id], shown = await _run(node, registry.cls(node), schema, hidden, given)
        results.seconds[id] = time.perf_counter() - start
        if shown:
            results.shown[id] = shown
        results.outputs |= {kept: values[id] for kept in keep if same.get(kept) == id}
        for link in _links(node):
            source = same[link.node]
            waiting[source] -= 1
            if waiting[source] == 0:
                del values[source]
    progress.node(len(run_order), len(run_order), "")
    return results


def _links(node: Node) -> list[Link]:
    return [value for value in node.inputs.values() if isinstance(value, Link)]


def _twins(graph: Graph, order: list[str], registry: Registry) -> dict[str, str]:
    """Node id -> the first node that must give the same outputs; itself for one that writes or that knows its id."""
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for id in order:
        node = graph.nodes[id]
        schema = registry.schema(node)
        signature: Any = id
        if not (schema.is_output_node or schema.hidden):
            inputs = (
                (name, (same[value.node], value.slot) if isinstance(value, Link) else repr(value))
                for name, value in node.inputs.items()
            )
            signature = node.class_type, tuple(sorted(inputs, key=lambda pair: pair[0]))
        same[id] = first.setdefault(signature, id)
    return same


def _hidden(node: Node, schema: Schema, graph: Graph, prompt: dict) -> HiddenHolder:
    told: dict[Hidden, Any] = {
        Hidden.unique_id: node.id,
        Hidden.prompt: prompt,
        Hidden.extra_pnginfo: None if graph.document is None else {"workflow": graph.document},
        Hidden.dynprompt: prompt,
    }
    return HiddenHolder(**{h.name: told[h] for h in schema.hidden})


async def _run(
    node: Node, cls: type[ComfyNode], schema: Schema, hidden: HiddenHolder, given: dict[str, list[Any]]
) -> tuple[Values, dict[str, Any]]:
    # A class of its own for each run, so that nothing a node learns outlives it.
    running: Any = type(cls.__name__, (cls,), {"hidden": hidden})
    returned = []
    for call in [given] if schema.is_input_list else _calls(given):
        arguments = fold(schema, call)
        blocked = next((a for items in call.values() for a in _each(items) if isinstance(a, ExecutionBlocker)), None)
        if blocked is not None:
            if blocked.message is not None:
                raise NodeError(node, f"it does not run: {blocked.message}")
            returned.append(NodeOutput(*[ExecutionBlocker(None)] * len(schema.outputs)))
            continue
        try:
            with torch.inference_mode():
                out = running.execute(**arguments)
                returned.append(await out if inspect.isawaitable(out) else out)
        except NodeError:
            raise
        except ValueError as error:  # what nodes and the maths raise for values that cannot work; UsageError too
            raise NodeError(node, str(error).rstrip(".") or "its inputs cannot be used") from error
        except Exception as error:
            raise NodeError(
                node, f"it failed with {type(error).__name__}: {error}", remedy="--debug shows where"
            ) from error
    return _collected(node, schema, [_normal(node, r, len(schema.outputs)) for r in returned])


def _each(value: Any) -> list[Any]:
    """What a node is given by one input: itself, or the items of a list that it takes whole."""
    return value if isinstance(value, list) else [value]


def _calls(given: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """One call for each item of the longest list; shorter lists repeat their last item."""
    if any(not items for items in given.values()):
        return []
    n = max((len(items) for items in given.values()), default=1)
    return [{k: items[min(i, len(items) - 1)] for k, items in given.items()} for i in range(n)]


def _normal(node: Node, returned: Any, outputs: int) -> NodeOutput:
    if isinstance(returned, NodeOutput):
        out = returned
    elif returned is None:
        out = NodeOutput()
    elif isinstance(returned, tuple):
        out = NodeOutput(*returned)
    elif isinstance(returned, dict):
        out = NodeOutput(*returned.get("result", ()), ui=returned.get("ui"))
    else:
        raise NodeError(node, f"it returned a {type(returned).__name__}", remedy="A node returns io.NodeOutput")
    if out.block_execution is not None:
        out = NodeOutput(*[ExecutionBlocker(out.block_execution)] * outputs, ui=out.ui)
    if out.expand is not None:
        raise NodeError(node, "it unfolds the graph, which needs ComfyUI", remedy="Run the workflow there")
    return out


def _collected(node: Node, schema: Schema, outs: list[NodeOutput]) -> tuple[Values, dict[str, Any]]:
    """Outputs by position over all calls, and what the node showed."""
    values: Values = []
    for slot, declared in enumerate(schema.outputs):
        items: list[Any] = []
        for out in outs:
            if slot >= len(out.args):
                raise NodeError(
                    node,
                    f"it returned {len(out.args)} of its {len(schema.outputs)} outputs",
                    remedy="This is a mistake in the node; please report it",
                )
            value = out.args[slot]
            items += value if declared.is_output_list and not isinstance(value, ExecutionBlocker) else [value]
        for item in items:
            _check_finite(node, declared.get_io_type(), item)
        values.append(items)
    shown: dict[str, Any] = {}
    for out in outs:
        ui = out.ui if isinstance(out.ui, dict) else out.ui.as_dict() if out.ui is not None else {}
        for key, entries in ui.items():
            shown.setdefault(key, []).extend(entries)
    return values, shown


def _check_finite(node: Node, kind: str, item: Any) -> None:
    """NaN would travel silently to a black image."""
    tensor = item.get("samples") if kind == "LATENT" and isinstance(item, dict) else item if kind == "IMAGE" else None
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NodeError(
            node,
            f"its {kind} holds NaN or infinity",
            remedy="Check the image or latent that goes in, lower the cfg, or run the model in fp32",
        )
