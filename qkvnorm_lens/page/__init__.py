"""The report's page."""

from qkvnorm_lens.page.report import html_report, write_html

__all__ = ["html_report", "write_html"]
