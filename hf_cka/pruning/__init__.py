"""Remove layers, sub-layers, heads and units: criteria score them, a plan names them, surgery removes them."""
