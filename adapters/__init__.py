"""Other people's interfaces onto ours."""
