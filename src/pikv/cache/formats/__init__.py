"""Formats that tokens are stored in, one file each: ``base.py`` has the contract."""
