"""What a run did, from the files that it wrote: its curves and its events, drawn on one page."""
