"""log p(x), and how far each estimate of it can be trusted."""
