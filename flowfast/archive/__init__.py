"""A search in one file, for programs without Python: export.py writes it, module.py is in it, load.py reads it."""
