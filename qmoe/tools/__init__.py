"""Commands that are more than a call: the demo, tuning of tiles, perplexity.

They stand on the whole runtime, and the demo alone also on the converter. The command line enters.
"""
