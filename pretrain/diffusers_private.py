"""Private interfaces of diffusers, reached here and nowhere else; docs/dependencies.md says what breaks without them."""

from __future__ import annotations

import warnings

from diffusers import PixArtAlphaPipeline

PRIVATE = {"PixArtAlphaPipeline": ("_text_preprocessing",)}
"""The names that are used below, by their owner: the table of docs/dependencies.md."""


def clean_as_pixart(caption: str) -> str:
    """A caption after PixArt-alpha's cleaning, twice as it has it; needs beautifulsoup4 and ftfy."""
    cleaner = object.__new__(PixArtAlphaPipeline)  # the method needs none of a pipeline's components
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Beautiful Soup's, of captions that look like file names
        return cleaner._text_preprocessing(caption, clean_caption=True)[0]
