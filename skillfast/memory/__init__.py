"""Memory: free bytes, living tensors, the size of states, a forward's footprint, and the plan made of them."""
