"""Core of a driver or worker process: submission, get and wait, execution, serialisation."""
