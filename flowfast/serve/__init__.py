"""`flowfast serve`: OpenAI's images API on one `flowfast.AsyncEngine` or several (extra `flowfast[serve]`).

Only this package knows FastAPI.
"""
