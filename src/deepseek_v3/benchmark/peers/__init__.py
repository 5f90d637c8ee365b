"""Other systems that train the same shape; each runs in a process of its own."""
