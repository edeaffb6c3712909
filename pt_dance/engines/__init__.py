"""Where work is done beyond this process: :class:`Ray`, on more processes or machines.

Whatever takes ``engine=`` works in this process where it is None, the default: for small jobs that is faster. Every
engine gives the same bytes, results and negatives.
"""

from pt_dance.engines.lazy import LazyPipeline
from pt_dance.engines.ray_engine import Ray

__all__ = ["LazyPipeline", "Ray"]
