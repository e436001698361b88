"""One thread and no gradients: the searcher's tests have small tensors, and threads that fight for cores cost far more
than they bring."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_no_grad():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
