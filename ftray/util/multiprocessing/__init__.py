"""`Pool`: the interface of `multiprocessing.Pool`, on the workers of a cluster.

    from ftray.util.multiprocessing import Pool
"""

from __future__ import annotations

from multiprocessing import TimeoutError

from ftray.util.multiprocessing.pool import Pool
from ftray.util.multiprocessing.results import AsyncResult

__all__ = ["AsyncResult", "Pool", "TimeoutError"]
