"""State machine of the control service (logic): tables, commands, and the managers that react to them."""
