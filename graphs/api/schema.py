"""The V3 node protocol without ComfyUI: Schema, ComfyNode, NodeOutput and what a node may learn about its run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .inputs import DynamicInput, Input, Output


class Hidden(str, Enum):
    """What a node may ask to be told about its run; the values are ComfyUI's."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"


@dataclass(frozen=True)
class HiddenHolder:
    """The answers, on `cls.hidden` while a node runs: its id, the prompt in API format, extra PNG text."""

    unique_id: str | None = None
    prompt: dict | None = None
    extra_pnginfo: dict | None = None
    dynprompt: dict | None = None


class ExecutionBlocker:
    """An output that is not there: nodes that need it do not run. message: said as an error by them; None: silently."""

    def __init__(self, message: str | None):
        self.message = message


@dataclass
class Schema:
    """A node's declaration, with the field names of `comfy_api.latest`. Errors: `validate` raises ValueError."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False

    def finalize(self) -> None:
        """Give an output node the prompt and PNG text it saves, and outputs without an id one."""
        if self.is_output_node:
            self.hidden += [h for h in (Hidden.prompt, Hidden.extra_pnginfo) if h not in self.hidden]
        for i, output in enumerate(self.outputs):
            if output.id is None:
                output.id = f"_{i}_{output.get_io_type()}_"

    def validate(self) -> None:
        """Raise ValueError when two inputs or two outputs share an id."""
        inputs = [i.id for top in self.inputs if not isinstance(top, DynamicInput) for i in top.get_all()]
        for kind, ids in (("input", inputs), ("output", [str(o.id) for o in self.outputs])):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            if twice:
                raise ValueError(f"{self.node_id}: {kind} ids must differ, but {', '.join(twice)} is used twice")


class NodeOutput:
    """What `execute` returns: the outputs in order, and what the UI shows beside them."""

    def __init__(self, *args: Any, ui: Any = None, expand: dict | None = None, block_execution: str | None = None):
        self.args = args
        self.ui = ui
        self.expand = expand
        self.block_execution = block_execution

    @property
    def result(self) -> tuple | None:
        """The outputs, or None when there are none."""
        return self.args or None


class ComfyNode:
    """Base of every node: subclasses define the class methods `define_schema` and `execute`; nodes have no state."""

    hidden: HiddenHolder = HiddenHolder()

    @classmethod
    def define_schema(cls) -> Schema:
        """The node's declaration."""
        raise NotImplementedError(f"{cls.__name__} defines no schema")

    @classmethod
    def execute(cls, *args: Any, **kwargs: Any) -> Any:
        """The node's work as a NodeOutput; inputs by id, outputs in the schema's order. May be a coroutine."""
        raise NotImplementedError(f"{cls.__name__} defines no execute")

    @classmethod
    def validate_inputs(cls, *args: Any, **kwargs: Any) -> bool | str:
        """True, or a message; given the constant inputs that its signature names."""
        raise NotImplementedError

    @classmethod
    def fingerprint_inputs(cls, *args: Any, **kwargs: Any) -> Any:
        """A value that changes when the node must run again although its inputs did not change."""
        raise NotImplementedError

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The schema, finalised and checked; ComfyUI's name for it."""
        schema = cls.define_schema()
        schema.finalize()
        schema.validate()
        return schema


class ComfyExtension:
    """What a pack hands over from its `comfy_entrypoint`."""

    async def on_load(self) -> None:
        """Called once before the nodes are asked for."""

    async def get_node_list(self) -> list[type[ComfyNode]]:
        """The pack's nodes."""
        raise NotImplementedError(f"{type(self).__name__} lists no nodes")
