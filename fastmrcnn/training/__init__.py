"""One step, the state around it, and what a run needs before and after."""
