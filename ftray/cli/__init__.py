"""Command line of ftray."""
