"""joblib on ftray: `register_ftray()`, then `joblib.parallel_config(backend="ftray")`.

Role: names; joblib itself is imported when one of them is called. The backend is in `backend.py`.
"""

from __future__ import annotations


def register_ftray() -> None:
    """Makes "ftray" a backend of joblib's: `with joblib.parallel_config(backend="ftray"): ...`.

    Calls then run as ftray tasks, on all CPUs of the cluster (`n_jobs=-1`, the default of this backend) or on as many
    as `n_jobs` says. A session is started with `ftray.init()` when the first of them runs and there is none. Options of
    `@ftray.remote` hold for the tasks when given as `parallel_config(backend="ftray", remote_args={"num_gpus": 1})`.

    Raises ImportError when joblib is not installed.
    """
    _register("ftray")


def register_ray() -> None:
    """As `register_ftray`, with the backend under the name "ray" too, for programs that come from Ray."""
    _register("ftray")
    _register("ray")


def _register(name: str) -> None:
    try:
        from joblib import register_parallel_backend
    except ImportError as error:
        raise ImportError("ftray.util.joblib needs joblib: pip install joblib") from error

    from ftray.util.joblib.backend import FtrayBackend

    register_parallel_backend(name, FtrayBackend)


__all__ = ["register_ftray", "register_ray"]
