"""One decode step of a whole model as a CUDA graph, and the loop that replays it.

The step runs a shadow of the model with kernels in place of small pieces; the user's model is never
changed. `qmoe.generate` and the tools enter through `loop.decode`.
"""
