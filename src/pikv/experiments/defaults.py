"""Defaults that the command line shows without importing what runs them."""

DEFAULT_METHODS = "none,duo:0.5,eplb:0.35+duo:0.15,eplb:0.9,duo:0.75,snapkv:0.75,streaming:0.75"
