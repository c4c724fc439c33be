"""How fast the module is beside the built-in endpoints and the physical limit."""
