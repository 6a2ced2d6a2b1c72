"""Presses of the kvpress library on PiKV's ragged cache (https://github.com/NVIDIA/kvpress)."""
