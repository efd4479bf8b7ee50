"""Reports: the page a run leaves behind, and what is shown while it runs."""

from ke_gym.report.page import write_report

__all__ = ["write_report"]
