"""Report of a run: `report.html`, one file from the run folder and predictions on test images."""

from equipoise.report.page import write_report

__all__ = ["write_report"]
