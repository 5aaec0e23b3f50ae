"""What can be done with a search besides going on with it: keep it in a file, load it, draw from it."""

from __future__ import annotations

from ..files.atomic import checked_name
from ..hosts.api import host, io, ui
from ..hosts.api import search as searches
from .checks import CheckedNode, at
from .inputs import schema, seed_input
from .search import ALIASES, CATEGORY, SEARCH_TREE


class RetortSaveSearch(CheckedNode):
    """A search that outlives the session."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortSaveSearch",
            display_name="Save Search",
            category=CATEGORY,
            description=(
                "Writes a search to output/retort_searches, with its tree or its noise policy, so that Load Search can "
                "give it to Resume Search on another day or another machine. Never overwrites a file."
            ),
            search_aliases=[*ALIASES, "save", "noise policy"],
            is_output_node=True,
            inputs=[
                SEARCH_TREE.Input("search", tooltip="From Tree Search, Resume Search or Learn Noise for a Prompt."),
                io.String.Input("name", default="search", tooltip="The file's name; a number is added to a taken one."),
            ],
            outputs=[io.String.Output(id="file", display_name="file", tooltip="The file's name, for Load Search.")],
        )

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("name"):
            checked_name(given["name"])

    @classmethod
    def execute(cls, search, name="search"):
        path = searches.save(host, search, name)
        return io.NodeOutput(path.stem, ui=ui.PreviewText(f"saved as {path.name}"))


class RetortLoadSearch(CheckedNode):
    """A search from a file."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortLoadSearch",
            display_name="Load Search",
            category=CATEGORY,
            description="Reads a search that Save Search wrote, or that an error left, from output/retort_searches.",
            search_aliases=[*ALIASES, "load", "noise policy"],
            inputs=[io.String.Input("file", default="search", tooltip="The file's name in output/retort_searches.")],
            outputs=[
                SEARCH_TREE.Output(id="search", display_name="search", tooltip="Resume Search, Draw, Learned Noise.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file=""):
        """Again when the file was written anew; always where the name is connected, which is not known here."""
        return searches.written(host, file) if isinstance(file, str) else float("nan")

    @classmethod
    def check(cls, given):
        """See the base."""
        if given.knows("file"):
            with at("file"):
                searches.path_of(host, given["file"])

    @classmethod
    def execute(cls, file):
        return io.NodeOutput(searches.load(host, file))


class RetortDrawFromSearch(CheckedNode):
    """Samples of the target that a search approached."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="RetortDrawFromSearch",
            display_name="Draw from Search",
            category=CATEGORY,
            description=(
                "Draws samples from a search instead of its best: of dts, pictures as likely as the model and the "
                "reward together make them. Costs no network calls; a small search repeats itself."
            ),
            search_aliases=[*ALIASES, "sample", "diverse"],
            inputs=[
                SEARCH_TREE.Input("search", tooltip="A search by dts, dts_star or fk."),
                io.Guider.Input("guider", tooltip="The search's guider, whose model says how its latents are stored."),
                io.Int.Input("count", default=4, min=1, max=4096, tooltip="Draws for each latent of the batch."),
                io.Boolean.Input(
                    "greedy", default=False, tooltip="Of a tree: go down the largest values instead of drawing."
                ),
                seed_input("Of the draws."),
            ],
            outputs=[io.Latent.Output(tooltip="The draws, those of each latent of the batch together.")],
        )

    @classmethod
    def execute(cls, search, guider, count=4, greedy=False, seed=0):
        return io.NodeOutput(searches.draw_from(host, guider, search, count, seed, greedy))
