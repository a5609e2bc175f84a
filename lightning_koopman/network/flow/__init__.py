"""Where each tensor of a pass came from: the batch, states, the network itself, or chance."""
