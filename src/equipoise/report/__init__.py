"""A page about a run: `report.html`, drawn from the run folder and the test images, with everything in one file."""

from equipoise.report.page import write_report

__all__ = ["write_report"]
