"""The report of a run: one self-contained offline page, `report.html`.

A run directory comes in, even of a killed or running run; one HTML file goes out. `reading.py`
reads metrics and traces, `samples.py` chooses trajectories, `tokens.py` shades their tokens,
`figures.py` (of an SFT run: `sft_figures.py`) chooses plots and headline numbers, `plots.py` draws
them as SVG, and `page.py` fills the template and writes the file. `picture.py` writes one plot
alone, of a run or of several, as an SVG file.
"""

from agentloop.report.page import write_report

__all__ = ["write_report"]
