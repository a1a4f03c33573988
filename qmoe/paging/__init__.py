"""Experts that are paged from host memory: budget, footprint, host store, expert cache, sharing.

`model` and `sharing` bind a cache to a model; the other files know no model and never import
transformers. Loading and the rooms above it may enter.
"""
