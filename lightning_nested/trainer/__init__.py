"""What callbacks and modules ask of a running Trainer."""
