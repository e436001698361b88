"""The rounds of a batch of slots, tensors only, so that they script: the loop, its state, and gradients that steer."""
