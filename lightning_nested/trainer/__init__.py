"""Parts of a running Trainer that several callbacks and modules use."""
