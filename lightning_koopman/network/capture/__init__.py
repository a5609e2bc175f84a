"""The states of all components, recorded while the network runs, and the chain that they make."""
