"""The HTML report: what it says (`content`) and how it is written (`render`)."""

from turnover.report.content import ReportContent
from turnover.report.render import render, write

__all__ = ["ReportContent", "render", "write"]
