"""Which experts tokens are routed to: recorded or drawn, replayed against cache policies, reported.

Nothing here runs a model or imports transformers. The command line, tools and benchmarks enter.
"""
