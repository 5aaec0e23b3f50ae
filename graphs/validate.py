"""Checks a graph before anything runs, and turns its constants into the types that nodes receive.

One mistake, one message: node, input, value, remedy. What ComfyUI's server checks is checked here too, in its order;
stricter are numbers that are not finite or not whole, and constants where only a connection makes sense.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from typing import Any

from ..files.errors import NodeError, UsageError, short
from ..files.paths import FileNames
from ..hosts.prompted import NODE, PROMPT
from .api.inputs import BooleanInput, ComboInput, FloatInput, Input, IntInput, StringInput, WidgetInput
from .api.schema import ComfyNode, Schema
from .dynamic import Live, fold, live_inputs
from .file_inputs import FileInput
from .graph import Graph, Link, Node
from .registry import Registry

_ANY = ("*", "COMFY_MATCHTYPE_V3")
_OLDER = "If the workflow was saved by another version of the node, open it in ComfyUI and save it again"


def validate(graph: Graph, registry: Registry) -> list[str]:
    """Check every node that an output needs, and complete its inputs in place. Returns those nodes' ids, in run order.

    Raises NodeError at the first mistake, UsageError when there is nothing to run.
    """
    outputs, order = needed(graph, registry)
    for id in order:
        _node(graph, graph.nodes[id], registry)
    return order


def needed(graph: Graph, registry: Registry) -> tuple[list[str], list[str]]:
    """The outputs that can run, and all nodes that they need in run order; nodes that are not known here are removed.

    What is left out is noted. Raises NodeError for a class that is not known and that an output needs, for a ring and
    for a missing source; UsageError when there is nothing to run.
    """
    known = [n.id for n in graph.nodes.values() if (schema := registry.find(n.class_type)) and schema.is_output_node]
    outputs = [id for id in known if not _unfed(graph, id, registry)] or known
    graph.notes += [
        f'node {id} "{short(graph.nodes[id].title)}" is left out: nothing is connected to its input'
        for id in known
        if id not in outputs
    ]
    order = _order(graph, outputs)
    strange = [n for n in graph.nodes.values() if registry.find(n.class_type) is None and n.id not in order]
    if not outputs:
        for node in strange:
            registry.schema(node)  # raises: what is not known may be the output
        raise UsageError("the workflow has no output node, so nothing would come of it; add SaveImage or PreviewImage")
    for node in strange:
        graph.notes.append(
            f'node {node.id} "{short(node.title)}" is left out: its class {short(repr(node.class_type))} is not known '
            "here, and no output needs it"
        )
        del graph.nodes[node.id]
    for id in order:
        registry.schema(graph.nodes[id])
    return outputs, order


def _unfed(graph: Graph, id: str, registry: Registry) -> bool:
    """Whether an output node lacks a connection that it cannot do without, as behind a muted branch."""
    node = graph.nodes[id]
    return any(
        live.required
        and live.name not in node.inputs
        and not (isinstance(live.input, WidgetInput) and not live.input.force_input)
        for live in live_inputs(registry.schema(node), node.inputs)
    )


def _order(graph: Graph, outputs: list[str]) -> list[str]:
    """Ids of every node that the outputs need, sources first. Raises NodeError for a ring and for a missing source."""
    done: dict[str, None] = {}
    for output in outputs:
        path: dict[str, Any] = {output: iter(_links(graph.nodes[output]))}
        while path:
            id = next(reversed(path))
            step = next(path[id], None)
            if step is None:
                done[id] = None
                del path[id]
                continue
            name, link = step
            if link.node in path:
                ring = [*list(path)[list(path).index(link.node) :], link.node]
                raise NodeError(
                    graph.nodes[link.node],
                    f"it needs its own output: {' <- '.join(ring)}",
                    remedy="Remove one of these links",
                )
            if link.node not in graph.nodes:
                raise NodeError(
                    graph.nodes[id],
                    f"it is linked to node {link.node}, which is not in the workflow",
                    input=name,
                    remedy="Connect it again",
                )
            if link.node not in done:
                path[link.node] = iter(_links(graph.nodes[link.node]))
    return list(done)


def _links(node: Node) -> list[tuple[str, Link]]:
    return [(name, value) for name, value in node.inputs.items() if isinstance(value, Link)]


def _node(graph: Graph, node: Node, registry: Registry) -> None:
    schema = registry.schema(node)
    lives = live_inputs(schema, node.inputs)
    checked: dict[str, Any] = {}
    for live in lives:
        if live.name in node.inputs:
            value = node.inputs[live.name]
            if isinstance(value, Link):
                _link(graph, node, live, value, registry)
                checked[live.name] = value
            else:
                checked[live.name] = _constant(node, live, value)
        elif isinstance(live.input, WidgetInput) and live.input.default is not None and not live.input.force_input:
            checked[live.name] = live.input.default
        elif live.required:
            kind = live.input.get_io_type()
            if isinstance(live.input, WidgetInput) and not live.input.force_input:
                raise NodeError(node, f"this {kind} is required and has no value", input=live.name, remedy=_OLDER)
            raise NodeError(
                node,
                f"a {kind} is required and nothing is connected",
                input=live.name,
                remedy=f"Connect an output of type {kind}",
            )
    known = {live.name for live in lives}
    extra = [name for name in node.inputs if name not in known]
    if extra:
        graph.notes.append(f'node {node.id} "{short(node.title)}": unknown input {", ".join(extra)} is ignored')
    node.inputs = checked
    _own_check(graph, node, registry.cls(node), schema, known)


def _link(graph: Graph, node: Node, live: Live, link: Link, registry: Registry) -> None:
    source = graph.nodes[link.node]
    outputs = registry.schema(source).outputs
    if not 0 <= link.slot < len(outputs):
        raise NodeError(
            node,
            f'it is linked to output {link.slot} of node {source.id} "{short(source.title)}", which has {len(outputs)}',
            input=live.name,
            remedy=f"Connect it again. {_OLDER}",
        )
    given, wanted = outputs[link.slot].get_io_type(), live.input.get_io_type()
    if not _fits(given, wanted):
        raise NodeError(
            node,
            f'a {wanted} is needed, but output {link.slot} of node {source.id} "{short(source.title)}" is a {given}',
            input=live.name,
            remedy=f"Connect an output of type {wanted}",
        )


def _fits(given: str, wanted: str) -> bool:
    sets = [{t.strip() for t in types.split(",")} for types in (given, wanted)]
    return bool(sets[0] & sets[1]) or any(t in _ANY for types in sets for t in types)


def _constant(node: Node, live: Live, value: Any) -> Any:
    one: Input = live.input
    if not isinstance(one, WidgetInput):
        if one.get_io_type() in _ANY:
            return value
        raise NodeError(
            node,
            f"it needs a connection from an output of type {one.get_io_type()}, not a value",
            input=live.name,
            value=value,
            remedy="Connect it",
        )
    if isinstance(one, ComboInput):
        return _combo(node, live.name, one, value)
    if isinstance(one, IntInput | FloatInput):
        return _number(node, live.name, one, value)
    if isinstance(one, BooleanInput):
        if isinstance(value, bool | int) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise NodeError(node, "it must be true or false", input=live.name, value=value, remedy=_OLDER)
    if isinstance(one, StringInput):
        if isinstance(value, str | int | float):
            return str(value)
        raise NodeError(node, "it must be a text", input=live.name, value=value, remedy=_OLDER)
    return value


def _number(node: Node, name: str, one: IntInput | FloatInput, value: Any) -> int | float:
    whole = isinstance(one, IntInput)
    number = _whole(value) if whole else _finite(value)
    if number is None:
        kind = "a whole number" if whole else "a finite number"
        raise NodeError(node, f"it must be {kind}", input=name, value=value, remedy=_OLDER)
    if one.min is not None and number < one.min:
        raise NodeError(node, f"it must be at least {one.min}", input=name, value=value, remedy=_range(one))
    if one.max is not None and number > one.max:
        raise NodeError(node, f"it must be at most {one.max}", input=name, value=value, remedy=_range(one))
    return number


def _whole(value: Any) -> int | None:
    """The value as an int where nothing is lost; seeds of 64 bits are not sent through a float."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = _finite(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None


def _finite(value: Any) -> float | None:
    if not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _range(one: IntInput | FloatInput) -> str:
    low, high = ("any" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in (one.min, one.max))
    return f"Allowed: {low} to {high}" + ("" if one.default is None else f"; the default is {one.default}")


def _combo(node: Node, name: str, one: ComboInput, value: Any) -> Any:
    if isinstance(one, FileInput) and isinstance(value, str):
        try:
            return one.check(value)
        except UsageError as problem:
            raise NodeError(node, str(problem), input=name) from problem
    if value in one.options:
        return one.options.spelt(value) if isinstance(one.options, FileNames) else value
    shown = ", ".join(map(str, one.options[:20])) or "nothing"
    more = f" and {len(one.options) - 20} more" if len(one.options) > 20 else ""
    raise NodeError(
        node, "this is not one of its choices", input=name, value=value, remedy=f"Choose {shown}{more}. {_OLDER}"
    )


def _own_check(
    graph: Graph, node: Node, cls: type[ComfyNode], schema: Schema, names: Collection[str]
) -> None:
    """The node's own validate_inputs, with the inputs that it names; connected ones are None, as in ComfyUI.

    What it raises may begin with the name of the input that it is about, and a colon.
    """
    check = cls.validate_inputs
    if "validate_inputs" not in {name for base in cls.__mro__[: cls.__mro__.index(ComfyNode)] for name in vars(base)}:
        return
    signature = inspect.signature(check).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature)
    given = fold(schema, {k: None if isinstance(v, Link) else v for k, v in node.inputs.items()})
    prompt, own = PROMPT.set(graph.prompt()), NODE.set(node.id)
    try:
        answer = check(**{k: v for k, v in given.items() if takes_all or k in {p.name for p in signature}})
    except ValueError as error:
        name, _, sentence = str(error).partition(": ")
        if name in names:
            raise NodeError(node, sentence, input=name) from error
        raise NodeError(node, str(error)) from error
    finally:
        PROMPT.reset(prompt)
        NODE.reset(own)
    if answer is not True:
        raise NodeError(node, answer if isinstance(answer, str) else "its own check of the inputs failed")
