"""Conveniences on top of the public interface."""
