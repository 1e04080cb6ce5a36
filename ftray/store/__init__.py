"""The object store of a node: where objects lie in the arena (pure logic), and the arena itself (`arena`, a shell)."""
