"""Everything that runs, kept running: children, their restarts, and who asks for what."""
