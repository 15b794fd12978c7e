"""The page's style sheet: one palette for light, one for dark, both told apart by colour-blind readers.

The hues are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), darkened for a white page until text in them has
the contrast that WCAG 2.2 AA asks for (4.5:1); a test computes it.
"""

from __future__ import annotations

from typing import Final

LIGHT: Final = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "text": "#1c2128",
    "soft": "#57606a",
    "rule": "#d4d9df",
    "link": "#0757a8",
    "good": "#0b6b3a",
    "bad": "#b3261e",
    "banner": "#fdecea",
    "c0": "#57606a",
    "c1": "#0062b1",
    "c2": "#b64b00",
    "c3": "#007856",
    "c4": "#9b3580",
    "c5": "#7a5c00",
    "c6": "#00718c",
    "c7": "#b4134a",
}
DARK: Final = {
    "page": "#14171b",
    "panel": "#1d2126",
    "text": "#e4e7eb",
    "soft": "#a3abb5",
    "rule": "#3a414a",
    "link": "#7ab8f5",
    "good": "#5fce8f",
    "bad": "#ff8a80",
    "banner": "#3b1c1c",
    "c0": "#a8b0ba",
    "c1": "#5cb5f2",
    "c2": "#f59a4c",
    "c3": "#35c79c",
    "c4": "#e08fc8",
    "c5": "#e8d44d",
    "c6": "#5fd3e8",
    "c7": "#ff8fab",
}

_RULES: Final = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 2px solid var(--text); }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; }
p, ul { max-width: 46rem; margin: .4rem 0 .8rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; max-width: none; }
.soft, figcaption, .note { color: var(--soft); font-size: .9rem; }
.banner { background: var(--banner); border-left: 5px solid var(--bad); padding: .6rem 1rem; margin: 1rem 0; }
.banner p { margin: .2rem 0; max-width: none; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.plots { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
@media (min-width: 900px) { .two { max-width: 820px; } }
figure { margin: 0; padding: .8rem; background: var(--panel); border-radius: 6px; }
figcaption { margin-bottom: .5rem; }
figcaption b { color: var(--text); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .axis { font-style: italic; }
svg .head { fill: var(--text); font-weight: 600; font-size: 11.5px; }
svg .value { fill: var(--text); }
svg .name { fill: var(--c); font-weight: 600; }
.subject { color: var(--c); }
.mark { fill: var(--c); stroke: var(--panel); stroke-width: 1; }
.round { fill: var(--c); fill-opacity: .4; }
.hollow { fill: none; stroke: var(--c); stroke-width: .8; }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.band { fill: var(--c); fill-opacity: .13; }
.range { stroke: var(--c); stroke-width: 1.8; stroke-linecap: round; }
.extent { stroke: var(--c); stroke-opacity: .5; }
.leader { stroke: var(--c); stroke-width: .8; stroke-dasharray: 1.5 2.5; }
.grid { stroke: var(--rule); stroke-width: .7; }
.base { stroke: var(--soft); stroke-width: 1; }
.one { stroke: var(--text); stroke-width: 1.2; stroke-dasharray: 4 3; }
svg.key { display: inline-block; width: .95em; height: .95em; vertical-align: -.1em; margin-right: .4em; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
caption span { display: block; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); }
thead th, thead td { border-bottom: 1.5px solid var(--soft); font-weight: 600; vertical-align: bottom; }
thead .number { white-space: normal; }
tbody th { font-weight: 400; }
tbody th:first-child, thead td:first-child { position: sticky; left: 0; background: var(--page); }
summary { color: var(--link); cursor: pointer; }
tbody th:first-child { min-width: 8rem; }
tbody.measure > tr > th:last-of-type { min-width: 0; }
tbody.measure > tr:first-child > th:first-child { font-weight: 600; min-width: 8rem; max-width: 14rem; }
.number { text-align: right; white-space: nowrap; }
.questions th[scope="row"] { min-width: 11rem; }
.questions .words { min-width: 8rem; }
.beside, .remark { display: block; color: var(--soft); font-size: .92em; }
.remark { max-width: 14rem; }
.prose { min-width: 13rem; }
.nowrap { white-space: nowrap; }
.outcome { min-width: 8.5rem; }
.strip { min-width: 110px; width: 170px; }
.strip .mark { stroke: var(--page); }
.strip .range { stroke-width: 2.4; }
.subject.good { --c: var(--good); }
.subject.bad { --c: var(--bad); }
.subject.plain { --c: var(--soft); }
.fields th { white-space: nowrap; font-weight: 600; }
@media (max-width: 600px) {
  main { padding: 1rem .8rem 3rem; }
  figure { padding: .6rem .5rem; }
  .fields th { white-space: normal; }
}
@media print { figure { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def sheet() -> str:
    """All of it, for a `<style>` element."""
    marks = "\n".join(f".c{index} {{ --c: var(--c{index}); }}" for index in range(8))
    return (
        f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n{marks}{_RULES}"
    )


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())
