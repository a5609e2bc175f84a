"""Inside a Trainer."""
