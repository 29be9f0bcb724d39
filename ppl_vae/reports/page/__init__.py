"""An HTML page in one file: text, figures, sliders and a live decoder.

Strings and arrays in, a string out. Runs no model, and writes no file.
"""

from ppl_vae.reports.page.blocks import (
    Block,
    Explorer,
    Picture,
    Section,
    Slider,
    SliderStop,
    Table,
    Text,
    VerdictBlock,
    decoder_weights,
)
from ppl_vae.reports.page.page import GENERATOR, page, true_minus

__all__ = [
    "GENERATOR",
    "Block",
    "Explorer",
    "Picture",
    "Section",
    "Slider",
    "SliderStop",
    "Table",
    "Text",
    "VerdictBlock",
    "decoder_weights",
    "page",
    "true_minus",
]
