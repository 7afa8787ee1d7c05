"""Readers of journals that write something derived: session files, and the index."""
