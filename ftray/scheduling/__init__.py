"""Resources of a node, and who may use them when. Pure logic."""
