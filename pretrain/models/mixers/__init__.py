"""The methods by which image tokens exchange information: one file and one line in a table each.

`DiTConfig.attention` names the method of the blocks that hold all tokens, `DiTConfig.density` the one that decides on how many
tokens each block computes. Any attention goes with any density.
"""

from pretrain.models.mixers.base import Attention, Density
from pretrain.models.mixers.flexdit import FlexDiT
from pretrain.models.mixers.full import Dense, FullAttention
from pretrain.models.mixers.mediators import Mediators

ATTENTIONS: dict[str, type[Attention]] = {method.name: method for method in (FullAttention, Mediators)}
DENSITIES: dict[str, type[Density]] = {method.name: method for method in (Dense, FlexDiT)}
