"""The manual. ``python -m docs.generate`` makes the pages that come from the code."""
