"""Dask on ftray: `x.compute(scheduler=ftray_dask_get)`, or `enable_dask_on_ftray()` for the whole program.

Role: names; Dask itself is imported when one of them is used. The scheduler is in `scheduler.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_NAMES = ("disable_dask_on_ftray", "enable_dask_on_ftray", "ftray_dask_get", "persist")
_RAYS_NAMES = {
    "disable_dask_on_ray": "disable_dask_on_ftray",
    "enable_dask_on_ray": "enable_dask_on_ftray",
    "ray_dask_get": "ftray_dask_get",
}

__all__ = [*_NAMES, *_RAYS_NAMES]


def __getattr__(name: str) -> Any:
    known = _RAYS_NAMES.get(name, name)
    if known not in _NAMES:
        raise AttributeError(f"module 'ftray.util.dask' has no attribute {name!r}")
    try:
        import dask  # noqa: F401
    except ImportError as error:
        raise ImportError("ftray.util.dask needs Dask: pip install dask") from error

    from ftray.util.dask import scheduler

    value = globals()[name] = getattr(scheduler, known)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:
    from ftray.util.dask.scheduler import disable_dask_on_ftray as disable_dask_on_ftray
    from ftray.util.dask.scheduler import enable_dask_on_ftray as enable_dask_on_ftray
    from ftray.util.dask.scheduler import ftray_dask_get as ftray_dask_get
    from ftray.util.dask.scheduler import persist as persist

    disable_dask_on_ray = disable_dask_on_ftray
    enable_dask_on_ray = enable_dask_on_ftray
    ray_dask_get = ftray_dask_get
