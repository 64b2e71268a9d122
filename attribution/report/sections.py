"""The sections of a report: every table and figure of the paper, in its order."""

from __future__ import annotations

from dataclasses import dataclass

from attribution.claims.paper import PAPER_MODELS

__all__ = ["MEASURED_BY", "SECTIONS", "Section"]


@dataclass(frozen=True)
class Section:
    """One table or figure of the paper.

    Attributes:
        number: Such as ``"Table 2"``.
        caption: What our counterpart shows.
        paper: What the paper's shows.
        models: The paper's models that it is about.
        measured: Whether a test makes an exhibit of it.
    """

    number: str
    caption: str
    paper: str
    models: tuple[str, ...] = tuple(PAPER_MODELS)
    measured: bool = True

    @property
    def about_one_prompt(self) -> bool:
        """Whether it shows a prompt, not a set of them."""
        return self.paper == _ONE_PROMPT

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return self.number.lower().replace(" ", "-")

    @property
    def name(self) -> str:
        """The name of an exhibit of it."""
        return self.number.lower().replace(" ", "_")


_BOTH = "GPT-2 large and Llama-7B"
_ONE_PROMPT = "This figure is not among the published ones that the project holds as data."
MEASURED_BY = "test_faithfulness test_knowledge"
"""Where the tests are that make exhibits."""

SECTIONS = (
    Section(
        "Table 1",
        "What a vector does to the probabilities that it is added to",
        "A worked example with four words, bs(x) = [1, 2, 3, 4]: what counts is not how large bs(v) is, but how much "
        "larger for one word than for the others.",
        measured=False,
    ),
    Section(
        "Table 2",
        "What is left of the answer after the ten best FFN neurons of each method are zeroed",
        f"Eight ways to score FFN neurons, on {_BOTH}. The better the score, the less is left.",
    ),
    Section(
        "Table 3",
        "What attention and FFN layers add to log p of the answer",
        f"Sums over all layers of the importance of layers, in nats, means over the prompts of {_BOTH}.",
    ),
    Section(
        "Table 4",
        "The ten most important layers of each category",
        f"The same for {_BOTH}, best first.",
    ),
    Section(
        "Table 5",
        "How much of the importance few neurons hold",
        "Sums of the importance of all neurons, of those above zero, and of the best 100 and 200, in nats, on "
        "Llama-7B. Table 12 is the same on GPT-2 large.",
        models=("llama-7b",),
    ),
    Section(
        "Table 6",
        "The layers that activate the FFN value neurons",
        f"The ten best query layers of the top 100 FFN value neurons, on {_BOTH}, best first.",
    ),
    Section(
        "Table 7",
        "What is lost when query neurons are zeroed",
        f"Fall of MRR and of the probability after 1,000 query neurons are zeroed, on {_BOTH}.",
    ),
    Section(
        "Table 8",
        "Neurons that most prompts of a category share",
        f"How many neurons are among the top 300 of more than half of the prompts of a category, on {_BOTH}.",
    ),
    Section(
        "Table 9",
        "Neurons in words",
        "The tokens that four neurons raise most: two value and two query neurons.",
    ),
    Section(
        "Table 10",
        "The ten most important heads of each category",
        f"The same for {_BOTH}, best first; a5.2 is head 2 of layer 5.",
    ),
    Section(
        "Table 11",
        "What is lost in one category when the best heads of another are zeroed",
        f"Fall of MRR / of the probability, in per cent, after the top 1% of heads are zeroed, on {_BOTH}.",
    ),
    Section(
        "Table 12",
        "How much of the importance few neurons hold, on GPT-2",
        "Table 5 on GPT-2 large.",
        models=("gpt2-large",),
    ),
    Section(
        "Table 13",
        "What is lost when value neurons are zeroed",
        "Fall of MRR and of the probability after the top 200 attention and the top 100 FFN neurons are zeroed, on "
        f"{_BOTH}.",
    ),
    Section(
        "Table 14",
        "The layers that activate the attention value neurons",
        f"The ten best query layers of the top 200 attention value neurons, on {_BOTH}, best first.",
    ),
    Section("Figure 1", "The method", "A drawing of the method. Nothing is measured in it.", measured=False),
    Section(
        "Figure 2",
        "The layers in which the top 10 FFN neurons of three methods lie",
        "The same on Llama-7B. Figure 9 is the same on GPT-2 large.",
    ),
    Section(
        "Figure 3",
        "log p and p on the straight way from the embedding to the output of the last layer",
        "The same in 60 steps, on Llama-7B: log p rises along the whole way, p only at its end. Figure 10 is the same "
        "on GPT-2 large.",
    ),
    Section("Figure 4", "Layers, heads and neurons of one prompt", _ONE_PROMPT, measured=False),
    Section("Figure 5", "Layers, heads and neurons of one prompt", _ONE_PROMPT, measured=False),
    Section("Figure 6", "Layers, heads and neurons of one prompt", _ONE_PROMPT, measured=False),
    Section("Figure 7", "Layers, heads and neurons of one prompt", _ONE_PROMPT, measured=False),
    Section(
        "Figure 8",
        "The layers of query neurons, of those that are value neurons as well and of those that are not",
        "The top query FFN neurons by layer, in two parts: those that are among the top value neurons, and the others.",
    ),
    Section(
        "Figure 9",
        "The layers in which the top 10 FFN neurons of three methods lie, on GPT-2",
        "Figure 2 on GPT-2 large.",
    ),
    Section(
        "Figure 10",
        "log p and p from the embedding to the output of the last layer, on GPT-2",
        "Figure 3 on GPT-2 large.",
    ),
)
