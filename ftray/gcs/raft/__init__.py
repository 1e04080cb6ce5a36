"""The GCS on several heads: a replica that agrees with its peers through Raft (see `replica.py`)."""
