"""The field's methods through their own packages, each imported only when its row is run.

All give positive = helpful, and higher = more suspicious for an instance itself.
"""

from .bergson_ import bergson
from .captum_ import tracin
from .cleanlab_ import cleanlab
from .dattri_ import conjugate_gradients, trak
from .kronfluence_ import ekfac
from .pydvl_ import pydvl

__all__ = ["bergson", "cleanlab", "conjugate_gradients", "ekfac", "pydvl", "tracin", "trak"]
