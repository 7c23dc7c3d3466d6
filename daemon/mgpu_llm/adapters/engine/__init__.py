"""The engine as a tree of processes: spawn, read, sample, end, clean up. Linux only."""
