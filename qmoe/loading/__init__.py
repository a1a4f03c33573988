"""From a checkpoint or a loaded model to one with 8-bit experts, and back.

This is the only room that knows the private loading interface of transformers: quantizers and
conversions. `qmoe.load`, `qmoe.patch` and `qmoe.unpatch` live here; rooms above may enter.
"""
