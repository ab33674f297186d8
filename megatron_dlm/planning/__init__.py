"""What a run needs before it is started: memory of a rank, time of a step, and the layouts that fit."""
