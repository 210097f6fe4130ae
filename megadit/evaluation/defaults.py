"""Defaults of what measures, readable before torch is imported."""

BATCH = 16  # held-out samples of a call on one rank, about
BINS = 10  # of times
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as its authors have them (arXiv 1801.01401)
