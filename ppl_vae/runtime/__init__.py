"""How tensors are computed on this machine: graphs, memory, processes, progress. Knows nothing of VAEs."""
