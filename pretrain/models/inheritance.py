"""The parameters that a model may start without, or from others, where a trained model with other settings is trained on.

A method's own file says which of its parameters come and go with it, and which can be taken from a model without it:

    query masks                          `focusdit/mask.py`: their own start, near 0.88: close to no mask
    mediators' tables and convolution    `mixers/mediators.py`: their own start
    FlexDiT's W1 and W2                  `mixers/flexdit.py`: their own start, 0 and the identity: all tokens are kept as they are
    FlexDiT's pooling blocks' values     `mixers/flexdit.py`: the last third of the trained `qkv`
    SPRINT's fusion                      `fusion.py`: its own start, which changes nothing
    alignment's projection               `alignment.py`: its own start, also where the trained one is of another width

Parameters of the trained model that the settings leave out are left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pretrain.models import alignment, fusion
from pretrain.models.focusdit import mask
from pretrain.models.mixers import ATTENTIONS, DENSITIES
from pretrain.models.mixers.base import DerivedParameter, Method

_METHODS: tuple[type[Method], ...] = (*ATTENTIONS.values(), *DENSITIES.values())

# Parts of the names of parameters that come and go with the settings.
optional_parameters: tuple[str, ...] = (
    *mask.OPTIONAL_PARAMETERS,
    fusion.PREFIX,
    alignment.PREFIX,
    *(part for method in _METHODS for part in method.optional_parameters),
)

# Those of them that start anew where the trained model's have another shape.
replaced_parameters: tuple[str, ...] = (alignment.PREFIX,)

# Parts of the names of parameters that are taken from others where a trained model has none of their name.
derived_parameters: Mapping[str, DerivedParameter] = MappingProxyType(
    {part: derived for method in _METHODS for part, derived in method.derived_parameters.items()}
)
