"""Quantized Mixture-of-Experts layers: formats, reference and Triton kernels."""
