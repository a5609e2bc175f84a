"""Access to the user's model that leaves no trace: hooks come off, modes and random states come back."""
