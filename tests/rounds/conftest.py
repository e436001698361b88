from tests.toys import no_grad  # noqa: F401
