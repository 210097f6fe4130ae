"""What a cluster is asked before a long run: checks that measure on every rank, and are judged on rank 0."""
