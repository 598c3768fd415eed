"""One math thread: the same bits on every machine of one kind, and no fight for the cores."""

import torch

torch.set_num_threads(1)
