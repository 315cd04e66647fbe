"""Processes and what they say to each other: the mesh, the collectives, the ledger."""
