"""Defaults that the command line shows without importing what runs them."""

DEFAULT_METHODS = "none,duo:0.5,eplb:0.35+duo:0.15,eplb:0.9,duo:0.75,snapkv:0.75,streaming:0.75"
DEFAULT_TASK = "retrieval"
CONTEXT_LENGTH = 1024
LONG_CONTEXT_LENGTH, THOROUGH_LONG_CONTEXT_LENGTH = 8192, 16_384
"""Lengths that are taken where the model has positions for them; fewer otherwise."""
NUM_CONTEXTS, THOROUGH_NUM_CONTEXTS = 4, 8
REPEATS, THOROUGH_REPEATS = 2, 3
"""How much ``pikv compare`` measures, and how much with ``--thorough``."""
