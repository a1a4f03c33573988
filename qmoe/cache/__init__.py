"""The expert cache: pages in host memory, slots in HBM, and what moves between them."""
