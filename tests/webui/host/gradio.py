"""Components with the parameters that Gradio 3.41.2 and 4.40.0 have in common, as far as the script uses them."""


class Component:
    def __init__(self, value=None, label=None, elem_id=None):
        self.value, self.label, self.elem_id = value, label, elem_id

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Row(Component):
    def __init__(self):
        super().__init__()


class Accordion(Component):
    def __init__(self, label=None, *, open=True, elem_id=None):
        super().__init__(None, label, elem_id)
        self.open = open


class Markdown(Component):
    def __init__(self, value=""):
        super().__init__(value)


class Textbox(Component):
    def __init__(self, value="", *, label=None):
        super().__init__(value, label)


class Slider(Component):
    def __init__(self, minimum=0, maximum=100, value=None, *, step=None, label=None):
        super().__init__(value, label)
        assert minimum <= value <= maximum
        assert step is not None and abs((value - minimum) / step - round((value - minimum) / step)) < 1e-9


class Dropdown(Component):
    def __init__(self, choices=None, *, value=None, label=None):
        super().__init__(value, label)
        assert value in choices
        self.choices = choices

    def change(self, fn, inputs=None, outputs=None, *, show_progress="full"):
        assert show_progress in ("full", "minimal", "hidden")
        self.told, self.inputs, self.outputs = fn, inputs, outputs
