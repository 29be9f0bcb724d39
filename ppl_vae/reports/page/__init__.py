"""An HTML page in one file: its blocks, its live decoder, and the page of a run."""
