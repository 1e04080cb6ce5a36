"""Where objects were made: a line of the program for each, if `record_call_sites` is set.

Role: shell around the interpreter's frames. Off by default: it costs a microsecond a call and a string an object.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftray.worker.core import Core

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def note_site(core: Core, object_id: bytes) -> None:
    """Remembers the innermost frame outside of this package; `core.sites` must be there."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is not None and core.sites is not None:
        core.sites[object_id] = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
