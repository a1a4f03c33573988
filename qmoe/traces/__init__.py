"""Which experts tokens were routed to: recorded, replayed against cache policies, and reported.

Nothing here runs a model or imports transformers. The command line, tools and benchmarks enter.
"""
