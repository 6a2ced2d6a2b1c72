"""How numbers are written in fewer bits; ``pikv.cache.formats`` stores what comes of it."""
