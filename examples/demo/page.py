"""The page: one HTML file with its style and figures inside, and nothing to load from elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .corpus import Domain
from .plots import average_bars, gain_bars
from .results import Result, Score, Verdict

STYLE = Path(__file__).with_name("page.css")
KINDS = {"base": "base", "expert": "experts, fine-tuned from it", "merge": "merges of the experts"}


def render(
    results: Sequence[Result],
    domains: Sequence[Domain],
    verdict: Verdict,
    diagnosis: Mapping[str, Any],
    recipes: Mapping[str, str],
) -> str:
    """The whole page. `diagnosis` is what `smelt check --json` printed; `recipes` are YAML texts by name."""
    sections = [
        f'<h1>Does merging pay?</h1><p class="verdict">{escape(str(verdict))}</p>',
        introduction(domains),
        f"<h2>Every model on every domain</h2>{heat_table(results, domains)}",
        f"<h2>Averages</h2>{legend()}{average_bars(results)}",
        f"<h2>Loss gained over the base</h2>{gain_bars(results, domains)}",
        f"<h2>What <code>smelt check</code> said</h2>{findings(diagnosis)}",
        f"<h2>The recipes</h2>{recipe_list(recipes)}",
    ]
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>smelt: does merging pay?</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>"
    )
    return f"{head}<body>{''.join(sections)}</body></html>\n"


def introduction(domains: Sequence[Domain]) -> str:
    titles = ", ".join(escape(domain.title) for domain in domains)
    return (
        "<p>A small Llama was trained on a mixture of text found on this Python installation, and one expert "
        f"fine-tuned from it for each of {len(domains)} domains: {titles}. smelt merged the experts; nothing was "
        "trained after that. All numbers are from text that no model was trained on.</p>"
        '<p class="note">Loss is in nats per token. An exact match is the next token of code, prose and names, '
        "and the whole answer of a Roman numeral, as greedy decoding would write it.</p>"
    )


def heat_table(results: Sequence[Result], domains: Sequence[Domain]) -> str:
    """Loss and exact match; the greener a cell, the lower its loss within its column."""
    columns = [[result.scores[domain.name] for result in results] for domain in domains]
    columns.append([result.average for result in results])
    titles = ["model", *(domain.title for domain in domains), "average"]
    rows = [f"<tr>{''.join(f'<th>{escape(title)}</th>' for title in titles)}</tr>"]
    for row, result in enumerate(results):
        first = ' class="first"' if row and results[row - 1].kind != result.kind else ""
        cells = "".join(heat_cell(column[row], column) for column in columns)
        rows.append(f"<tr{first}><td>{key(result.kind)}{escape(result.model)}</td>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def heat_cell(score: Score, column: Sequence[Score]) -> str:
    losses = [other.loss for other in column]
    low, high = min(losses), max(losses)
    share = 60 * (high - score.loss) / ((high - low) or 1.0)
    best = " best" if score.loss == low else ""
    text = f"{score.loss:.3f} <small>{score.exact:.1%}</small>"
    return f'<td class="heat{best}" style="--share:{share:.0f}">{text}</td>'


def legend() -> str:
    return f"<p>{' &emsp; '.join(key(kind) + text for kind, text in KINDS.items())}</p>"


def key(kind: str) -> str:
    return f'<span class="key {kind}"></span>'


def findings(diagnosis: Mapping[str, Any]) -> str:
    """Its findings, the numbers of the task vectors, and the recipe that it would begin with."""
    said = [
        f"<li>{escape(finding['severity'])}: {escape(finding['message'])}</li>" for finding in diagnosis["findings"]
    ]
    overall = diagnosis["overall"]
    models = table(
        ("task vector", "norm / base", "median |delta|", "99 % of |delta| below"),
        ((m["model"], f"{m['ratio']:.3f}", f"{m['p50']:.1e}", f"{m['p99']:.1e}") for m in overall["models"]),
    )
    pairs = table(
        ("two task vectors", "cosine", "sign conflicts"),
        ((f"{p['a']}, {p['b']}", f"{p['cosine']:.3f}", f"{p['conflict']:.1%}") for p in overall["pairs"]),
    )
    return f"<ul>{''.join(said)}</ul>{models}<br>{pairs}{advice(diagnosis['advice'])}"


def advice(advised: Mapping[str, Any] | None) -> str:
    if advised is None:
        return ""
    reasons = "; ".join(escape(reason) for reason in advised["reasons"])
    return f"<p>Its advice: begin with <code>{escape(advised['method'])}</code>, because {reasons}.</p>"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def recipe_list(recipes: Mapping[str, str]) -> str:
    return "".join(
        f"<details><summary><code>smelt merge recipes/{escape(name)}.yml merges/{escape(name)}</code></summary>"
        f"<pre>{escape(text)}</pre></details>"
        for name, text in recipes.items()
    )
