"""What a run found, for people: one page of HTML, and a table for the terminal. Both from `harness.results` alone.

Page       report.html, one file: no network, no script, light and dark, wide and narrow; JSON and CSV lie beside.
Group      the measures that share a plot; beneath it stands the table of the same numbers, and how they were taken.
Mark       a subject's colour and shape, the same in every plot, so that neither alone has to tell it apart.
Loss       a ratio whose whole interval is on the wrong side of 1 for what is ours. Losses come before gains.

Direction: `page` puts together what `groups` and `verdicts` draw with `plot`; what is true of the numbers is decided in
`findings`, how they are written in `wording`; `markup` escapes.
"""

from benchmarks.report.page import write

__all__ = ["write"]
