"""Measurements: what methods cost in quality, time and memory. Needs the extra ``cli``."""

from pikv.extras import require

require("cli", "pikv.evaluation")
