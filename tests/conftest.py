"""One thread unless a test asks for more: small tensors gain nothing from a second one, and two threads on a busy
core wait for each other."""

import torch

torch.set_num_threads(1)
