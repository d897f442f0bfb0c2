"""The table of bins: frozen edges, integer counts, and what they tell about ranks."""
