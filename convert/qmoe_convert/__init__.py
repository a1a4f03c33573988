"""Quantize a checkpoint's experts, shard by shard."""
