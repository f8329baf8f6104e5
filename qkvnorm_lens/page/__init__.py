"""The report's page."""

from qkvnorm_lens.page.caches import cache_page
from qkvnorm_lens.page.report import html_report, write_html

__all__ = ["cache_page", "html_report", "write_html"]
