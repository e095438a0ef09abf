"""Mutated files of every kind that is read: refused with an error that was meant, or read as others read them.

``python -m tests.fuzz`` runs it: by what the code does with a file, through atheris, where that is installed; else
by chance. ``tests/test_fuzz.py`` makes a small part of it, and keeps what was ever found.
"""
