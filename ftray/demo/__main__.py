"""`python -m ftray.demo`."""

from __future__ import annotations

from ftray.demo.command import main

if __name__ == "__main__":
    main()
