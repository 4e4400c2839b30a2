"""Records become pages and figures."""

from rankfold.reports.page import read_records, report, write_page

__all__ = ["read_records", "report", "write_page"]
