"""Inputs and outputs of V3 nodes without ComfyUI: the arguments and `io_type` strings of `comfy_api.latest`."""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any, ClassVar


class FolderType(str, Enum):
    """Where a shown file lies."""

    input = "input"
    output = "output"
    temp = "temp"


class UploadType(str, Enum):
    """What an upload button of a combo takes."""

    image = "image_upload"
    audio = "audio_upload"
    video = "video_upload"
    model = "file_upload"


class NumberDisplay(str, Enum):
    """How a number widget is drawn."""

    number = "number"
    slider = "slider"
    gradient_slider = "gradientslider"


class ControlAfterGenerate(str, Enum):
    """What happens to a seed widget after each run; its value is stored behind the seed's in UI workflows."""

    fixed = "fixed"
    increment = "increment"
    decrement = "decrement"
    randomize = "randomize"


class Input:
    """A socket. `optional` inputs may be absent from `execute`'s arguments."""

    io_type: ClassVar[str] = "*"

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        advanced: bool | None = None,
    ):
        self.id = id
        self.display_name = display_name
        self.optional = optional
        self.tooltip = tooltip
        self.lazy = lazy
        self.advanced = advanced

    def get_io_type(self) -> str:
        """The type string that links are checked with."""
        return self.io_type

    def get_all(self) -> list[Input]:
        """This input and those nested in it."""
        return [self]


class WidgetInput(Input):
    """An input that also has a widget, hence a default and a place among the widget values of a UI workflow."""

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        default: Any = None,
        socketless: bool | None = None,
        widget_type: str | None = None,
        force_input: bool | None = None,
        advanced: bool | None = None,
    ):
        super().__init__(id, display_name, optional, tooltip, lazy, advanced)
        self.default = default
        self.socketless = socketless
        self.widget_type = widget_type
        self.force_input = force_input

    def get_io_type(self) -> str:
        """The type string; a widget type, where one is given, stands for the socket's."""
        return self.widget_type or self.io_type


class Output:
    """An output socket; `is_output_list` hands on a list whose items are run through later nodes one by one."""

    io_type: ClassVar[str] = "*"

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ):
        self.id = id
        self.display_name = display_name or id
        self.tooltip = tooltip
        self.is_output_list = is_output_list

    def get_io_type(self) -> str:
        """The type string that links are checked with."""
        return self.io_type


class BooleanInput(WidgetInput):
    """A toggle."""

    def __init__(self, id: str, *args, label_on: str | None = None, label_off: str | None = None, **kwargs):
        super().__init__(id, *args, **kwargs)
        self.label_on, self.label_off = label_on, label_off


class NumberInput(WidgetInput):
    """A number with a range; both ends belong to it."""

    def __init__(
        self, id: str, *args, min=None, max=None, step=None, display_mode: NumberDisplay | None = None, **kwargs
    ):
        super().__init__(id, *args, **kwargs)
        self.min, self.max, self.step, self.display_mode = min, max, step, display_mode


class IntInput(NumberInput):
    """A whole number; `control_after_generate` makes it a seed."""

    def __init__(self, id: str, *args, control_after_generate: bool | ControlAfterGenerate | None = None, **kwargs):
        super().__init__(id, *args, **kwargs)
        self.control_after_generate = control_after_generate


class FloatInput(NumberInput):
    """A number; `round` is the widget's, not applied here."""

    def __init__(self, id: str, *args, round: float | bool | None = None, **kwargs):
        super().__init__(id, *args, **kwargs)
        self.round = round


class StringInput(WidgetInput):
    """A text."""

    def __init__(
        self,
        id: str,
        *args,
        multiline: bool = False,
        placeholder: str | None = None,
        dynamic_prompts: bool | None = None,
        **kwargs,
    ):
        super().__init__(id, *args, **kwargs)
        self.multiline, self.placeholder, self.dynamic_prompts = multiline, placeholder, dynamic_prompts


class ComboInput(WidgetInput):
    """One of a list of options; `upload` adds a button, whose label is stored behind the value in UI workflows."""

    def __init__(
        self,
        id: str,
        options: list | type[Enum] | None = None,
        *args,
        default: Any = None,
        control_after_generate: bool | ControlAfterGenerate | None = None,
        upload: UploadType | None = None,
        image_folder: FolderType | None = None,
        remote: Any = None,
        **kwargs,
    ):
        super().__init__(id, *args, **kwargs)
        self.default = default.value if isinstance(default, Enum) else default
        if isinstance(options, type) and issubclass(options, Enum):
            options = [option.value for option in options]
        # A list's own class may know more than one spelling of an option.
        self.options: list = options if isinstance(options, list) else list(options or [])
        self.control_after_generate = control_after_generate
        self.upload, self.image_folder, self.remote = upload, image_folder, remote


class ComboOutput(Output):
    """An output that carries one of a list of options."""

    def __init__(self, id: str | None = None, display_name: str | None = None, options: list | None = None, **kwargs):
        super().__init__(id, display_name, **kwargs)
        self.options = options or []


class DynamicInput(Input):
    """An input that stands for several; `dynamic.expand` turns it into those that are live."""


class AutogrowTemplate:
    """The repeated input and the names its copies take; the first `min` are required."""

    def __init__(self, input: Input, names: list[str], min: int):
        if isinstance(input, DynamicInput):
            raise ValueError(f'Autogrow: the repeated input "{input.id}" must be a plain one')
        self.input = copy.copy(input)
        if isinstance(self.input, WidgetInput):
            self.input.force_input = True
        self.names, self.min = names[:100], min

    def get_all(self) -> list[Input]:
        """One input for each name."""
        copies = []
        for name in self.names:
            one = copy.copy(self.input)
            one.id = name
            copies.append(one)
        return copies


class TemplatePrefix(AutogrowTemplate):
    """Names made of a prefix and a number."""

    def __init__(self, input: Input, prefix: str, min: int = 1, max: int = 10):
        if not 0 <= min <= max <= 100 or max < 1:
            raise ValueError(f"Autogrow: 0 <= min <= max <= 100 is needed, got min {min} and max {max}")
        super().__init__(input, [f"{prefix}{i}" for i in range(max)], min)
        self.prefix, self.max = prefix, max


class TemplateNames(AutogrowTemplate):
    """Names from a list."""

    def __init__(self, input: Input, names: list[str], min: int = 1):
        super().__init__(input, names, min)


class AutogrowInput(DynamicInput):
    """A growing row of inputs; `execute` gets a dict of those that are connected."""

    def __init__(self, id: str, template: AutogrowTemplate, *args, **kwargs):
        super().__init__(id, *args, **kwargs)
        self.template = template

    def get_all(self) -> list[Input]:
        """This input and every copy."""
        return [self, *self.template.get_all()]


class DynamicComboOption:
    """One choice and the inputs that it brings."""

    def __init__(self, key: str, inputs: list[Input]):
        self.key, self.inputs = key, inputs


class DynamicComboInput(DynamicInput):
    """A combo whose choice brings further inputs; `execute` gets one dict with the choice and their values."""

    def __init__(self, id: str, options: list[DynamicComboOption], *args, **kwargs):
        super().__init__(id, *args, **kwargs)
        self.options = options

    def get_all(self) -> list[Input]:
        """This input and those of every option."""
        return [self, *(i for option in self.options for i in option.inputs)]
