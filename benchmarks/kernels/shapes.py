"""Shapes of real models' layers, and which of them are measured for what."""

from __future__ import annotations

from qmoe_kernels.tiles import LayerShape

SHAPES = {
    "qwen3": LayerShape(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768),
    "mixtral": LayerShape(num_experts=8, top_k=2, hidden_size=4096, intermediate_size=14336),
    "dsv3": LayerShape(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048),
    "olmoe": LayerShape(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024),
    "gptoss": LayerShape(num_experts=32, top_k=4, hidden_size=2880, intermediate_size=2880),
    "qwen3next": LayerShape(num_experts=512, top_k=10, hidden_size=2048, intermediate_size=512),
    "phimoe": LayerShape(num_experts=16, top_k=2, hidden_size=4096, intermediate_size=6400),
    "granite": LayerShape(num_experts=40, top_k=8, hidden_size=1536, intermediate_size=512),
    "glm45air": LayerShape(num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1408),
    "scout": LayerShape(num_experts=16, top_k=1, hidden_size=5120, intermediate_size=8192),
    "ernie": LayerShape(num_experts=64, top_k=6, hidden_size=2560, intermediate_size=1536),
    "lfm2": LayerShape(num_experts=32, top_k=4, hidden_size=2048, intermediate_size=1792),
}
# Have goals of their own (`benchmarks.kernels.targets`).
WITH_TARGETS: tuple[str, ...] = ("qwen3", "mixtral", "dsv3")
TOKENS: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
# The rule was not fitted on them: what users of other models get.
HELD_OUT: tuple[str, ...] = ("glm45air", "scout", "ernie", "lfm2")
HELD_OUT_TOKENS: tuple[int, ...] = (1, 4, 16, 64, 256, 512, 1024, 4096)
# The rule was fitted on these.
FITTED: tuple[str, ...] = (*WITH_TARGETS, "olmoe", "gptoss", "qwen3next", "phimoe", "granite")
