"""How much may be lost, when, and where."""
