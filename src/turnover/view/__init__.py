"""The interactive view of a run: a page on this machine that reads the run's results on demand.

For runs too large for the self-contained report: `columns` stores the pairs by training instance,
`contents` answers the page's questions, `doubtful` those about labels, `decisions` stores decisions, `effect`
measures what they do, `application` has the routes, and `server` serves them.
"""

from turnover.view.server import open_view

__all__ = ["open_view"]
