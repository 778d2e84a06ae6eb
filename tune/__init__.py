"""Ray Tune around our own trials: the trainable, its resources, search spaces and schedulers."""
