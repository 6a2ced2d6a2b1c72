"""Things by name: what is said of a name that nothing has."""
