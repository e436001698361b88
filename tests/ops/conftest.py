import pytest

import flowfast.ops
from flowfast.errors import OptionError


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Runs the test once in each backend, and makes sure that this backend is the one that answers."""
    try:
        context = flowfast.ops.use_backend(request.param)
        context.__enter__()
    except OptionError as error:
        pytest.skip(str(error))
    assert {name for name, _ in flowfast.ops.live().values()} == {request.param}
    yield request.param
    context.__exit__(None, None, None)
