"""Settings for all tests."""

import torch

# Tensors here are small: a second thread would wait more than work, and on a busy machine wait for ever.
torch.set_num_threads(1)
