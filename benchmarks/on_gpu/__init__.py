"""The parts of ``gpu.py``: what holds on a device, and how fast it is there."""
