"""ZeRO 0 to 3: one flat layout per unit, and a rule per stage for what a rank keeps between uses."""

from minizero.zero.api import GatheredParameters, Init, unsharded

__all__ = ["GatheredParameters", "Init", "unsharded"]
