"""Progress bars of the methods that need masks: what a target takes by each of them."""

from __future__ import annotations

from turnover.batches import Batch
from turnover.influence.blockwise import Walk
from turnover.influence.plan import pilot
from turnover.influence.progress import Progress


def bar_of(walk: Walk, ids: int, first: Batch, *, mean: bool, shown: bool) -> Progress:
    """A bar of targets.

    Args:
        walk: how they are gone through.
        ids: number of training ids.
        first: a batch of targets.
        mean: whether they are one target.
        shown: whether it is shown.
    """
    networks = len(walk.engines)
    work = {kind: networks * each for kind, each in walk.work(ids).items()}
    # The derivatives of the mean are one target's.
    once = {"pair": work.pop("pair")} if mean and "pair" in work else None
    guesses = pilot(walk, first, 1 if mean else len(first)) if shown else None
    return Progress(f"influence ({walk.method})", work, once=once, seconds=guesses, shown=shown)


def own_bar(networks: int, exact: int, *, shown: bool) -> Progress:
    """A bar of rows that are scored on themselves.

    Args:
        networks: how many.
        exact: ids that each row is scored on exactly; 0: its derivatives are all that takes time.
        shown: whether it is shown.
    """
    work = {"exact": networks * exact} if exact else {"backward": networks}
    return Progress("self-influence", work, unit="row", shown=shown)
