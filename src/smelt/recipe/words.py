"""Which known word did the user mean?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'ties'?", or nothing when no candidate is near."""
    known = {candidate.lower(): candidate for candidate in candidates}
    nearest = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.7)
    return f"; did you mean {known[nearest[0]]!r}?" if nearest else ""
