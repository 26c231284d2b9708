"""Training of a text-to-image diffusion transformer, and sampling from it."""

import data_prep  # noqa: F401  # gives a user without a name one, before torch is imported
