"""Models: the bundled demo model."""

from pikv.models.demo import load_demo

__all__ = ["load_demo"]
