import pytest
from triton_interpreter import INTERPRETED

import flowfast.ops
from flowfast.errors import OptionError


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "cpp"])
def backend(request):
    """Runs the test once in each backend, and makes sure that this backend is the one that answers.

    "triton" has a process of its own, see test_triton.py.
    """
    try:
        context = flowfast.ops.use_backend(request.param)
        context.__enter__()
    except OptionError as error:
        pytest.skip(str(error))
    answering = {name for name, _ in flowfast.ops.live().values()}
    assert request.param in answering
    yield request.param
    context.__exit__(None, None, None)
