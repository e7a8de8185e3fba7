"""A report as one HTML page with no other files: everything that comes from a model is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { --ink: #1d2733; --soft: #5b6875; --line: #d9dfe5; --wash: #f5f7f9; --good: #1a7f4e; --none: #9a5b00; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
section { border: 1px solid var(--line); border-radius: 6px; padding: 1rem; margin: 1rem 0; }
.badge { color: white; border-radius: 4px; padding: 0 .5em; font-size: .85rem; background: var(--none); }
.buffered, .recurrent { background: var(--good); }
pre { background: var(--wash); padding: .7rem; overflow-x: auto; font-size: .85rem; line-height: 1.35; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
td, th { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); } td:first-child, th:first-child { text-align: left; }
tr.chosen { background: #e6f3ec; font-weight: 600; } td.bar { width: 40%; text-align: left; }
td.bar i { display: block; height: .7rem; background: #7f9db9; } tr.plain td.bar i { background: #c9ced4; }
tr.chosen td.bar i { background: var(--good); }
.wide { overflow-x: auto; } p { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; color: var(--soft); font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .6rem; } section { padding: .6rem; } td, th { padding: .15rem .3rem; }
  td.bar, th.bar { display: none; }
}
summary { cursor: pointer; color: var(--soft); margin-top: .5rem; }
"""


def page(
    headline: str,
    calls: Sequence[str],
    notes: Sequence[str],
    groups: Sequence[tuple[dict[str, Any], list[str]]],
    legend: Sequence[tuple[str, str]],
) -> str:
    """The page. calls: about whole graphs. groups: StateReports as dicts, each with the names of the states that it
    stands for. legend: terms and what they mean."""
    body = [f"<h1>kvbuffer report</h1><p class=soft>{escape(headline)}</p>"]
    body += [f"<p>{escape(call)}</p>" for call in calls]
    body += [f"<p>note: {escape(note)}</p>" for note in notes]
    body += [_section(state, names) for state, names in groups]
    if any(state["prediction"] for state, _ in groups):
        terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in legend)
        body.append(f"<dl>{terms}</dl>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kvbuffer report</title><style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _section(state: dict[str, Any], names: list[str]) -> str:
    facts = f"{' x '.join(map(str, state['shape']))} {state['dtype']}, {state['source'] or 'source unknown'}"
    status, more = escape(state["status"]), f" and {len(names) - 1} more" if len(names) > 1 else ""
    parts = [
        f"<h2><span class='badge {status}'>{status}</span> {escape(state['name'] + more)}</h2>",
        f"<p class=soft>{escape(facts)}</p>",
        f"<p>{escape(state['rule'] + ': ' if state['rule'] else '')}{escape(state['reason'])}</p>",
    ]
    if state["prediction"]:
        parts.append(_candidates(state["prediction"]))
    for title, text in (("program", state["program"]), ("plan", state["plan"]), ("states", "\n".join(names))):
        if text and (title != "states" or len(names) > 1):
            parts.append(f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>")
    return f"<section>{''.join(parts)}</section>\n"


def _candidates(prediction: dict[str, Any]) -> str:
    """What was compared: a bar for each candidate's predicted time, Inductor's first."""
    rows = [("Inductor", "plain", prediction["plain"])]
    for i, candidate in enumerate(prediction["candidates"]):
        name = "recurrent" if candidate["variant"] == "recurrent" else f"buffered, L = {candidate['flush']}"
        name += "" if candidate["measured"] is None else " (measured)"
        rows.append((name, "chosen" if i == prediction["chosen"] else "", candidate))
    longest = max(candidate["seconds"] for _, _, candidate in rows)
    unit, scale = ("ms", 1e3) if longest >= 1e-3 else ("us", 1e6)
    lines = [
        f"<tr class='{kind}'><td>{name}</td><td>{c['bytes'] / 1e6:.4g}</td><td>{c['seconds'] * scale:.4g}</td>"
        f"<td>{c['gain']:.2f}x</td><td class=bar><i style='width:{100 * c['seconds'] / longest:.1f}%'></i></td></tr>"
        for name, kind, c in rows
    ]
    head = f"<tr><th>predicted</th><th>MB a step</th><th>{unit} a step</th><th>gain</th><th class=bar></th></tr>"
    machine = prediction["machine"]
    speed = f"{escape(machine['name'])}, {machine['speeds'][-1]['copy'] / 1e9:.3g} GB/s"
    facts = f"{escape(prediction['formula'])} &middot; target {escape(prediction['target'])} &middot; {speed}"
    return f"<div class=wide><table>{head}{''.join(lines)}</table></div><p class=soft>{facts}</p>"
