"""Checkpoints as files: headers, the on-disk schema of 8-bit experts, and what a folder holds.

No weight is read here and no model is built. Every room and the converter may enter.
"""
