"""`python -m ftray.cli`, for when the `ftray` script is not on the path."""

from __future__ import annotations

from ftray.cli import main

main(prog_name="ftray")
