"""The report of a run: one self-contained offline page, `report.html`, written from what a run directory holds."""

from agentloop.report.page import write_report

__all__ = ["write_report"]
