"""The command `qmoe`: a file for each command, and what they print.

Nothing imports it; it may enter every room.
"""
