"""`Pool`: the interface of `multiprocessing.Pool`, on the workers of a cluster.

    from ftray.util.multiprocessing import Pool
"""

from __future__ import annotations

from multiprocessing import TimeoutError

from ftray.util.multiprocessing.pool import AsyncResult, Pool

__all__ = ["AsyncResult", "Pool", "TimeoutError"]
