"""Chaos harness: breaks a running cluster of real processes on a schedule, then checks what it promised."""
