"""Mutation testing: small faults put into the code, one at a time; a test should fail for each.

Neither mutmut nor cosmic-ray fits. The first wraps functions in closures, which element formulas may not be, and
leaves decorated ones alone; the second removes no statement and swaps no arguments, draws no sample, and spends most
of its mutants on exchanging operators that raise TypeError.
"""
