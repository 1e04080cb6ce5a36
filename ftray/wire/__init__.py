"""Wire: frames, the handshake and message types (pure), and the reactor that moves them (shell)."""
