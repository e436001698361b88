"""`flowfast serve`: OpenAI's images API on one `flowfast.AsyncEngine` (extra `flowfast[serve]`).

Only this package knows FastAPI.
"""
