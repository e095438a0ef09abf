"""Benchmarks: smelt against the physical floor and against its predecessor, in one alternating run.

Nothing here is part of the installed package. See README.md beside this file.
"""
