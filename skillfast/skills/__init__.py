"""Skills: ranking neurons, choosing the set that is a skill, learning it by gradient."""
