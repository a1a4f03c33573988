"""What a model's experts are, and the module that stands in for them.

`layout` reads off a module how it stores its experts, `gate` what it computes between its two
products, `pages` what one expert looks like as bytes, and `quantized` is the 8-bit module. `guard`
says who uses a model and who changes it. Every room above may enter; this one knows checkpoints and
kernels, and nothing of transformers.
"""
