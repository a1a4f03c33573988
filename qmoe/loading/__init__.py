"""From a checkpoint or a loaded model to one with 8-bit experts, and back.

This is the only room that knows the private loading interface of transformers: quantizers and
conversions. `load` and `patch` hold `qmoe.load`, `qmoe.patch` and `qmoe.unpatch`, `layers` what
they do to each layer, and `protection` what a model refuses afterwards; rooms above may enter.
"""
