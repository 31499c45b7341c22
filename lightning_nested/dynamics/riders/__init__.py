"""Find the different solutions that a training run could have reached."""
