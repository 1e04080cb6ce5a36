"""Global control service: journal, replica, server and client around the state machine in `state`."""
