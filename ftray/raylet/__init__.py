"""Raylet: the node process, with its worker pool, template, log capture and sessions."""
