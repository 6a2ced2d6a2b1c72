"""What routers have where nobody says otherwise, for those who show it without importing torch."""

NUM_EXPERTS = 4
CAPACITY_FACTOR = 1.5
DROPOUT = 0.1
AUX_LOSS_WEIGHT = 0.01
