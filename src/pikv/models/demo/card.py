def write_card(*a, **k):
    pass
