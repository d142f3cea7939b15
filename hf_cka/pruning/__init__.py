"""Remove layers, sub-layers, heads and units: what to remove (criteria), a plan of it (plan), and doing it (surgery)."""
