"""`flowfast bench`: how fast requests are, alone and many at once, through the engine that a server has."""
