"""The interactive view of a run: a page on this machine that reads the run's results on demand.

For runs too large for the self-contained report: `columns` lays the pairs out by training instance,
`contents` answers what the page asks, `decisions` keeps what was decided, `server` serves all of it.
"""

from turnover.view.server import open_view

__all__ = ["open_view"]
