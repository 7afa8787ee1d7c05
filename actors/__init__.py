"""Owners, the host that runs them and the supervisor above. Start with `owner.py`."""
