"""The network run again, on batches or recorded calls, with parts of it replaced."""
