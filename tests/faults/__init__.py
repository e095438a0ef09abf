"""Faults on purpose: runs of smelt that are killed, starved and lied to, and what must hold afterwards.

``python -m tests.faults`` runs the whole campaign, ``tests/test_faults.py`` a small part of each experiment.
"""
