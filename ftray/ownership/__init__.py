"""Ownership (logic): who owns an object, who borrows it, which task makes it and how often it may be retried."""
