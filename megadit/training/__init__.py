"""Training: a config becomes a run, a run makes steps, and the loop says who hears of them."""
