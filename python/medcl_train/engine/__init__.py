"""Engine of the reference trainers: settings, the loop, checkpoints, logging, reproducible random
numbers."""
