"""What was measured, and whether merging paid."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from rich.console import Console
from rich.table import Table

from .corpus import Domain

Kind = Literal["base", "expert", "merge"]


@dataclass(frozen=True)
class Score:
    """Mean loss in nats per scored token, and the share of scored stretches predicted exactly (0 to 1)."""

    loss: float
    exact: float


@dataclass(frozen=True)
class Result:
    """The scores of one model by the name of the domain."""

    model: str
    kind: Kind
    scores: Mapping[str, Score]

    @property
    def average(self) -> Score:
        """The mean over the domains, each counting the same."""
        scores = self.scores.values()
        return Score(fmean(score.loss for score in scores), fmean(score.exact for score in scores))


@dataclass(frozen=True)
class Verdict:
    """The best merge against the best of the models that it was made from, on the average of the domains.

    It is chosen among the merges by its loss; `by_loss` and `by_exact` name the best single models.
    """

    merge: Result
    by_loss: Result
    by_exact: Result

    @property
    def loss_gain(self) -> float:
        """Nats per token by which the merge beats the best single model."""
        return self.by_loss.average.loss - self.merge.average.loss

    @property
    def exact_gain(self) -> float:
        """Share of exact matches by which the merge beats the best single model."""
        return self.merge.average.exact - self.by_exact.average.exact

    @property
    def holds(self) -> bool:
        """Whether the merge beats the base and every expert on both averages."""
        return self.loss_gain > 0 and self.exact_gain > 0

    def __str__(self) -> str:
        claim = "beats every single model" if self.holds else "does NOT beat every single model"
        return (
            f"The merge {self.merge.model} {claim} on the average of the domains: "
            f"loss {self.merge.average.loss:.3f} against {self.by_loss.average.loss:.3f} ({self.by_loss.model}), "
            f"exact match {self.merge.average.exact:.1%} against {self.by_exact.average.exact:.1%} "
            f"({self.by_exact.model})."
        )


def judge(results: Sequence[Result]) -> Verdict:
    """Compares the best merge with the best single models."""
    merges = [result for result in results if result.kind == "merge"]
    singles = [result for result in results if result.kind != "merge"]
    return Verdict(
        merge=min(merges, key=lambda result: result.average.loss),
        by_loss=min(singles, key=lambda result: result.average.loss),
        by_exact=max(singles, key=lambda result: result.average.exact),
    )


def show(results: Sequence[Result], domains: Sequence[Domain]) -> None:
    """Prints one row per model, "loss / exact match" per domain, the best of each column in bold."""
    table = Table(title="Held-out loss in nats per token, and exact matches", title_justify="left")
    table.add_column("model")
    for heading in (*(domain.title for domain in domains), "average"):
        table.add_column(heading, justify="right")
    columns = [[result.scores[domain.name] for result in results] for domain in domains]
    columns.append([result.average for result in results])
    best = [(min(s.loss for s in column), max(s.exact for s in column)) for column in columns]
    for row, result in enumerate(results):
        cells = [cell(column[row], *limits) for column, limits in zip(columns, best, strict=True)]
        closes = row + 1 < len(results) and results[row + 1].kind != result.kind
        table.add_row(result.model, *cells, end_section=closes)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def cell(score: Score, lowest_loss: float, highest_exact: float) -> str:
    loss, exact = f"{score.loss:.3f}", f"{score.exact:6.1%}"
    return f"{bold(loss, score.loss == lowest_loss)} {bold(exact, score.exact == highest_exact)}"


def bold(text: str, wanted: bool) -> str:
    return f"[bold green]{text}[/]" if wanted else text
