"""How long a step, inference and loading take, and where the time goes."""
