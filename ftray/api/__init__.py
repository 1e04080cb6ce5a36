"""The public interface: what `import ftray` hands out, room by room."""
