"""Expert parallelism: the equal-split exchange between the ranks that hold different experts."""
