"""What may go: blocks dropped, components made linear, weights cut in precision."""
