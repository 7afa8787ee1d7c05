"""What owners are told and answer, what happens in them and what they keep: one file an owner."""
